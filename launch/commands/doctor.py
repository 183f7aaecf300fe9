"""What launch/doctor.py does, once its words are read."""

from __future__ import annotations

import argparse
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from pathlib import Path

import torch
import torch.distributed as dist
from tqdm import tqdm

from data_pipelines.preparing.verifying import count, verify
from engine.cohort.precision import set_precision
from engine.config import ConfigError, RunConfig
from engine.config import loading as configuration
from engine.files import write_json
from engine.preflight import check_data
from engine.ranks.collectives import Launch, choose_device, start
from launch.entry import require_torchrun, user_errors
from launch.examining.exchange import exchange
from launch.examining.machine import clocks, machine
from launch.examining.rates import Rates, decode_rate, limits, read_rate, train_rate

_SHOWN = 20


def run(options: argparse.Namespace, chosen: str, overrides: Sequence[str]) -> None:
    """Looks at the machine, or at every file."""
    launch = Launch.from_environment()
    with user_errors():
        require_torchrun("launch/doctor.py")
        config = configuration.load(chosen, overrides)
        damaged = files(config, options.threads, options.json) if options.files else 0
        if not options.files:
            examine(config, launch)
    if damaged:
        raise SystemExit(1)


def examine(config: RunConfig, launch: Launch) -> None:
    """Prints what there is, how fast it is, and what limits the run: rank 0 for its machine, and for all together."""
    sizes = check_data(config)
    device = choose_device(config.device, launch)
    start(launch, device)
    try:
        together = [*clocks(), *exchange(device)]
        if launch.rank == 0:
            print(*machine(config, device), *together, sep="\n", flush=True)
            print(*_rates(config, device, sizes.classes), sep="\n", flush=True)
        dist.barrier()
    finally:
        dist.destroy_process_group()


def _rates(config: RunConfig, device: torch.device, classes: int) -> Iterator[str]:
    if not config.data.photos:
        yield f"data: {config.data.dataset} is held on the device; nothing is decoded"
        return
    set_precision(config, device)
    read, size = read_rate(config)
    yield f"storage: {read:,.0f} photos/s, {size / 1e6:,.0f} MB/s, of photos that may have been in memory"
    decoded = decode_rate(config, device)
    yield f"decoding alone: {decoded:,.0f} images/s"
    ranks = max(1, torch.cuda.device_count())
    yield from limits(Rates(read, decoded, train_rate(config, device, classes)), config, ranks)


def files(config: RunConfig, threads: int, report: Path | None) -> int:
    """Prints, and writes to `report`, what cannot be read. Returns how many files that are. Raises: ConfigError."""
    if not config.data.photos:
        raise ConfigError(
            f"data.dataset = {config.data.dataset}: is read and checked as a whole at each start; only the files "
            "of data sets of photos are looked at one by one"
        )
    check_data(config)
    total = count(config.data.where)
    looked = tqdm(verify(config.data.where, threads), total=total, unit=" files", disable=None)
    found = [damaged for damaged in looked if damaged is not None]
    for damaged in found[:_SHOWN]:
        print(f"{damaged.path}: {damaged.reason}")
    if len(found) > _SHOWN:
        print(f"... and {len(found) - _SHOWN} more; --json FILE has them all")
    by_split = Counter(damaged.split for damaged in found)
    parts = ", ".join(f"{by_split[split]:,} of {split}" for split in ("train", "val"))
    print(f"{total:,} files, {len(found):,} that cannot be read: {parts}")
    if report:
        write_json(report, [asdict(damaged) for damaged in found])
    return len(found)

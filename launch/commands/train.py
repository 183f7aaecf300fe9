"""What launch/train.py does, once its words are read."""

from __future__ import annotations

import argparse
import contextlib
import os
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch
from torch.distributed.elastic.multiprocessing.errors import record

from engine.config import loading as configuration
from engine.files import write_text
from engine.forecast import forecast
from engine.preflight import look_at
from engine.ranks.collectives import Launch, choose_device
from engine.reporting.closing import closing
from engine.reporting.console import print_soon
from engine.reporting.report.curves import curves
from engine.reporting.report.table import table
from engine.trainer import train
from launch.entry import require_torchrun, user_errors


def print_keys() -> None:
    """Prints every key with its default and meaning, on rank 0."""
    if Launch.from_environment().rank == 0:
        print(configuration.describe())


@record
def run(options: argparse.Namespace, chosen: str, overrides: Sequence[str], noted: Sequence[int]) -> None:
    """Trains, or checks, or prints the config.

    Args:
        options: of the command line.
        chosen: a YAML file or the folder of a run.
        overrides: `section.key=value`.
        noted: signals that have come since the process began.
    """
    launch = Launch.from_environment()
    with user_errors():
        config = configuration.load(chosen, overrides)
        if options.print_config:
            if launch.rank == 0:
                print(configuration.dump(config), end="")
            return
        fresh = options.fresh and _first_start()
        if options.check:
            device = None
            if options.ranks is not None:
                launch = Launch(0, 0, options.ranks)
                device = torch.device("cpu" if config.device == "cpu" else "cuda")
            checked = look_at(config, launch, fresh=fresh, device=device)
            if launch.rank == 0:
                cuda = (device or choose_device(config.device, launch)).type == "cuda"
                lines = forecast(config, checked, cuda=cuda)
                print(f"{config.title}: {config.method.name}; {checked.placement}", *lines, sep="\n  ")
            return
        require_torchrun("launch/train.py")
        if options.preempted and launch.rank == 0:
            options.preempted.unlink(missing_ok=True)
        begin = time.monotonic()
        complete = train(config, launch, fresh=fresh, preempted=options.preempted, before=noted, ends_process=True)
        if complete and launch.rank == 0:
            _summarise(config.folder, time.monotonic() - begin)


def _first_start() -> bool:
    # A restart by torchrun or by Slurm repeats the command line, and must go on, not start over.
    return not any(int(os.environ.get(name, 0)) for name in ("TORCHELASTIC_RESTART_COUNT", "SLURM_RESTART_COUNT"))


def _summarise(folder: Path, seconds: float) -> None:
    """The run is complete whatever becomes of this."""
    text = table([folder])
    with _said("curves.png"):
        curves([folder], folder / "curves.png")
    with _said("table.txt"):
        write_text(folder / "table.txt", text + "\n")
    with _said("the table on standard output"):
        print_soon("\n".join(["", text, "", *closing(folder, seconds), ""]))


@contextlib.contextmanager
def _said(what: str) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        with contextlib.suppress(OSError):
            print(f"the run is complete; {what} could not be written: {error}", file=sys.stderr, flush=True)

"""`launch/bench peers`: whole steps, data included, against the plain trainer's."""

from __future__ import annotations

import statistics
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from data_pipelines import Batch, open_pipeline
from engine.config.loading import validate
from engine.ranks.collectives import Launch
from launch.bench.peers import Workload, bench_cohort, engine_step
from launch.bench.plain import contrast, objectives
from launch.bench.plain.networks import Shape
from launch.bench.plain.objectives import Objective
from launch.bench.plain.trainer import MEAN, STD, Trainer, batches
from launch.bench.turns import Times, loading_in_turn, quartiles

CLASSES, SIDE = 10, 32
_THREADS = "ours, a thread a peer"
_COMPILED = "ours, compiled"


@dataclass(frozen=True)
class Case:
    """What is compared."""

    method: Mapping[str, Any]
    """The section `method` of a config."""
    plain: Callable[[Shape, int], Objective]
    peers: int = 2
    network: str = "cifar_resnet32_b"
    views: str = "shared"


def _outer(shape: Shape, peers: int) -> Objective:
    return contrast.LMCL(shape, peers, interval=1)


_SMALL = "cifar_resnet8_b"
CASES = {
    "dml": Case({"name": "dml"}, objectives.DML),
    "dml-4": Case({"name": "dml"}, objectives.DML, 4, _SMALL),
    "dml-8": Case({"name": "dml"}, objectives.DML, 8, _SMALL),
    "independent": Case({"name": "independent"}, objectives.Networks),
    "kdcl": Case({"name": "kdcl"}, objectives.KDCL, views="per_peer"),
    "pcl": Case({"name": "pcl"}, objectives.PCL, 3, views="per_peer"),
    "one": Case({"name": "one"}, objectives.ONE, 3),
    "ffl": Case({"name": "ffl"}, objectives.FFL),
    "okddip": Case({"name": "okddip"}, objectives.OKDDip, 3),
    "cl_ilr": Case({"name": "cl_ilr"}, objectives.CLILR, 3),
    "dcm": Case({"name": "dcm"}, objectives.DCM),
    "dcl": Case({"name": "dcl"}, objectives.DCL),
    "codistillation": Case({"name": "codistillation", "interval": 10}, objectives.Codistillation),
    "mcl": Case({"name": "mcl", "negatives": "batch"}, contrast.MCL),
    "lmcl": Case({"name": "lmcl", "negatives": "batch", "meta_interval": None}, contrast.LMCL),
    "lmcl-outer": Case({"name": "lmcl", "negatives": "batch", "meta_interval": 1}, _outer),
}


def peers(
    names: Sequence[str],
    batch: int,
    rounds: int,
    steps: int,
    workers: int,
    device: torch.device,
    *,
    compiled: bool,
    quick: bool,
) -> None:
    """Times each case in turn with its plain trainer, and prints both and the ratio.

    Args:
        names: of CASES.
        batch: rows of a step.
        rounds: timings of each, at least two.
        steps: in one timing.
        workers: processes of the plain trainer's DataLoader.
        device: where ours trains; the plain trainer is on the CPU.
        compiled: time ours with `precision.compile` too.
        quick: tiny networks, a step at a time.
    """
    rng = np.random.default_rng(0)
    count = max(4 * batch, 256) if quick else 10_000
    images = rng.integers(0, 256, (count, SIDE, SIDE, 3), dtype=np.uint8)
    labels = np.arange(count) % CLASSES
    print(
        f"peers: {batch} rows, {SIDE} px, {count:,} images, {torch.get_num_threads()} threads, {workers} workers of "
        f"the plain loader, torch {torch.__version__}"
    )
    with tempfile.TemporaryDirectory() as folder:
        for split in ("train", "val"):
            np.savez(Path(folder, f"{split}.npz"), images=images, labels=labels)
        found: dict[str, Times] = {}
        for name in names:
            case = replace(CASES[name], network=_SMALL) if quick else CASES[name]
            data = batches(images, labels, case.peers if case.views == "per_peer" else 1, batch, workers)
            plain = Trainer(case.plain(Shape(case.network, CLASSES, SIDE), case.peers), data)
            variants = {"ours": _ours(case, batch, Path(folder), device), "plain": plain.step}
            threads = torch.get_num_threads()
            if threads > 1 and not isinstance(plain.objective, objectives.Branched):
                variants[_THREADS] = _ours(case, batch, Path(folder), device, peer_threads=threads)
            if compiled:
                variants[_COMPILED] = _ours(case, batch, Path(folder), device, compile=True)
            once = 1 if quick or name == "lmcl-outer" else steps
            found[name] = loading_in_turn(variants, rounds, once)
            print_case(name, case, found[name])
            del plain, variants, data  # its workers end here
        if {"lmcl", "lmcl-outer"} <= found.keys():
            print_outer(found["lmcl"], found["lmcl-outer"])


def _ours(case: Case, batch: int, folder: Path, device: torch.device, **how: Any) -> Callable[[], object]:
    """A step, with fields of `Workload` for how it is computed."""
    work = Workload(case.network, SIDE, batch, peers=case.peers, method=case.method, classes=CLASSES, views=case.views)
    work = replace(work, **how)
    cohort = bench_cohort(work, device, Launch(0, 0, 1))
    config = validate(
        {
            "name": "bench",
            "method": {"name": "independent"},
            "peers": [{"network": case.network}],
            "data": {
                "dataset": "npz",
                "root": str(folder),
                "global_batch": batch,
                "mean": list(MEAN),
                "std": list(STD),
                "augmentation": {"padding": 4, "padding_mode": "zeros"},
            },
            "train": {"epochs": 1},
        }
    )
    pipeline = open_pipeline(config.data, 0, device)

    def epochs() -> Iterator[Batch]:
        epoch = 0
        while True:
            yield from pipeline.train(epoch, 0, slice(0, batch), cohort.views)
            epoch += 1

    return engine_step(cohort, work, batches=epochs())


def print_case(name: str, case: Case, times: Times) -> None:
    """A line for each way in which ours goes about it."""
    for who in times:
        if who != "plain":
            _line(f"{name:15} {case.peers} x {case.network:17} {who:22}", times[who], times["plain"])


def print_outer(without: Times, outer: Times) -> None:
    """What an outer step alone costs either, and both together with one every 50 steps."""
    alone = {who: [b - a for a, b in zip(without[who], outer[who], strict=True)] for who in without}
    every = {who: [a + x / 50 for a, x in zip(without[who], alone[who], strict=True)] for who in without}
    _line("lmcl, outer step alone", alone["ours"], alone["plain"])
    _line("lmcl, one every 50 steps", every["ours"], every["plain"])


def _line(what: str, ours: list[float], plain: list[float]) -> None:
    low, middle, high = quartiles([b / a for a, b in zip(ours, plain, strict=True)])
    print(
        f"  {what} {1000 * statistics.median(ours):8.1f} ms, plain {1000 * statistics.median(plain):8.1f}: "
        f"{middle:.2f} times as fast (quartiles {low:.2f} to {high:.2f})",
        flush=True,
    )

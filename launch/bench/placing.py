"""`torchrun --nproc-per-node=4 launch/bench placement`: two unequal peers, ranks in proportion to their cost against
as many each."""

from __future__ import annotations

import argparse
import os
import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import NamedTuple

import torch
import torch.distributed as dist

from data_pipelines import Batch
from engine.cohort.cohort import Cohort
from engine.config import ConfigError, RunConfig
from engine.config.loading import validate
from engine.ranks.collectives import Launch
from engine.ranks.placement import Placement
from engine.ranks.planning.choosing import plan
from engine.ranks.planning.costs import costs_of
from engine.ranks.planning.hardware import GPUS
from engine.ranks.planning.planner import Cluster, Load, PeerLoad, predict
from engine.training.step import train_step
from engine.training.timing import Clock
from launch.bench.passes import timed_peers
from launch.bench.turns import in_turn, print_comparison
from losses import Progress

CLASSES, SIDE = 10, 32
KINDS = ("spread", "balanced")
NAMES = ("small", "large")


def placing(options: argparse.Namespace, launch: Launch, device: torch.device) -> None:
    """Times DML between a ResNet-8 and a ResNet-20, about 1 : 3, in both placements in turn, beside what the planner
    foretells: from operations, or with --measure from the peers' passes, timed here apart from any step.

    On fewer cores than ranks a step takes as long as all work shared among the cores, whoever has it: there a placement
    shows in what the busiest rank computes alone, in seconds of a core.

    Raises:
        ConfigError: the ranks cannot be dealt evenly.
    """
    if launch.world < 4 or launch.world % 2:
        raise ConfigError(f"--nproc-per-node = {launch.world}: expected an even number of ranks, 4 or more")
    batch, rounds = options.batch, 3 if options.quick else options.rounds
    config = _config("spread", batch)
    load = Load([PeerLoad(name, _counted(cost), 0) for name, cost in zip(NAMES, costs_of(config), strict=True)], batch)
    if options.measure:  # By all ranks at a time, as they compute in a step: what they share, they share here too.
        dist.barrier()
        load = replace(load, peers=timed_peers(config, load, CLASSES, launch.world))
    busy: dict[str, list[float]] = {kind: [] for kind in KINDS}
    cohorts = {kind: _cohort(kind, batch, launch, device) for kind in KINDS}
    variants = {kind: _step(cohort, busy[kind]) for kind, cohort in cohorts.items()}
    times = in_turn(variants, rounds, options.steps, device)
    # The first steps, which settle what is kept, are as many as in a timing.
    most = torch.tensor([statistics.median(busy[kind][options.steps :]) for kind in KINDS])
    dist.all_reduce(most, dist.ReduceOp.MAX)
    if launch.rank:
        return
    one, other = (peer.seconds(batch) for peer in load.peers)
    groups = {kind: [len(group.ranks) for group in cohort.placement.groups] for kind, cohort in cohorts.items()}
    how = "as timed here" if options.measure else "by operations"
    print(
        f"placement: ResNet-8 and ResNet-20, 1 : {sum(other) / sum(one):.2f} {how}, {batch} rows of {SIDE} px, "
        f"{launch.world} ranks, {torch.get_num_threads()} thread each, {_cores()} cores; ranks {groups}"
    )
    print_comparison(times, *KINDS)
    for kind, seconds in zip(KINDS, most.tolist(), strict=True):
        print(f"  {kind:12} {1000 * seconds:8.2f} ms of a core a step on the busiest rank")
    shown = {kind: statistics.median(times[kind]) for kind in KINDS}
    alone = {kind: foretold(cohort.placement, load) for kind, cohort in cohorts.items()}
    print(comparison(alone, dict(zip(KINDS, most.tolist(), strict=True)), shown, _cores(), measured=options.measure))


class Foretold(NamedTuple):
    """Of a step in a placement: seconds of a core, or operations."""

    busiest: float
    """On the rank that has most."""
    whole: float
    """On all ranks."""

    def on(self, cores: int) -> float:
        """What it takes at least on so many cores."""
        return max(self.busiest, self.whole / cores)


def foretold(placement: Placement, load: Load) -> Foretold:
    """What the planner makes of it: compute, and waiting for the slowest."""
    found = predict(placement, load, Cluster(GPUS["h100"], placement.world))
    return Foretold(found.compute + found.waiting, found.compute * placement.world)


def comparison(
    alone: Mapping[str, Foretold],
    busiest: Mapping[str, float],
    wall: Mapping[str, float],
    cores: int,
    *,
    measured: bool,
) -> str:
    """What was foretold beside what was measured, as lines.

    Args:
        alone: of each placement.
        busiest: seconds of a core of the busiest rank, and
        wall: of a step, as measured.
        measured: whether what was foretold is in seconds.
    """
    one, other = KINDS
    ratios = [alone[one].busiest / alone[other].busiest, busiest[one] / busiest[other]]
    lines = [f"  busiest rank, {one} / {other}: foretold {ratios[0]:.3f}, measured {ratios[1]:.3f}{_off(*ratios)}"]
    if measured:
        for kind in KINDS:
            seconds = alone[kind].busiest, busiest[kind]
            lines.append(
                f"  {kind:12} foretold {1000 * seconds[0]:8.2f} ms of a core on the busiest rank{_off(*seconds)}: the "
                "passes and the update alone"
            )
    shared = alone[one].on(cores) / alone[other].on(cores)
    lines.append(
        f"  wall clock on {cores} cores, {one} / {other}: foretold {shared:.3f}, all work shared evenly; measured "
        f"{wall[one] / wall[other]:.3f}{_off(shared, wall[one] / wall[other])}"
    )
    if shared < 0.95 * ratios[0]:
        lines.append(
            "  ranks share cores, which all work keeps busy: wall clock can show no more here; with a core a rank it "
            "would be the busiest rank's ratio"
        )
    return "\n".join(lines)


def _off(foretold: float, measured: float) -> str:
    return f" ({foretold / measured - 1:+.0%})"


def _cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _counted(cost: float) -> Callable[[int], tuple[float, float]]:
    return lambda rows: (cost * rows / 3, 2 * cost * rows / 3)


def _config(kind: str, batch: int) -> RunConfig:
    return validate(
        {
            "name": "bench",
            "method": {"name": "dml"},
            "peers": [
                {"network": "cifar_resnet8_b", "name": NAMES[0]},
                {"network": "cifar_resnet20_b", "name": NAMES[1]},
            ],
            "data": {"dataset": "fashion_mnist_subset", "global_batch": batch},
            "train": {"epochs": 1},
            "schedule": {"name": "constant"},
            "placement": {"kind": kind},
        }
    )


def _cohort(kind: str, batch: int, launch: Launch, device: torch.device) -> Cohort:
    config = _config(kind, batch)
    where = plan(config, launch.world, launch.rank)
    return Cohort(config, where, device, num_classes=CLASSES, channels=1, image_size=SIDE, steps_per_epoch=1000)


def _step(cohort: Cohort, busy: list[float]) -> Callable[[], object]:
    [share] = cohort.shares
    generator = torch.Generator().manual_seed(0)
    rows = slice(share.rows.start, share.rows.stop)
    n = share.batch
    images = torch.randn(n, 1, SIDE, SIDE, generator=generator)[rows].to(memory_format=torch.channels_last)
    targets, ids = torch.randint(CLASSES, (n,), generator=generator)[rows], torch.arange(n)[rows]
    batch = Batch((images.to(cohort.device),), targets.to(cohort.device), ids.to(cohort.device))
    clock = Clock(cohort.device)

    def step() -> None:
        begin = time.process_time()
        train_step(cohort, [batch], Progress(len(busy), 1000, 1), clock)
        busy.append(time.process_time() - begin)
        clock.read()

    return step

"""`torchrun --nproc-per-node=4 launch/bench placement`: two unequal peers, ranks in proportion to their cost against
as many each."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable

import torch
import torch.distributed as dist

from data_pipelines import Batch
from engine.cohort.cohort import Cohort
from engine.config import ConfigError
from engine.config.loading import validate
from engine.ranks.collectives import Launch
from engine.ranks.placement import interval
from engine.ranks.planning.choosing import plan
from engine.ranks.planning.costs import costs_of
from engine.training.step import train_step
from engine.training.timing import Clock
from launch.bench.turns import in_turn, print_comparison
from losses import Progress

CLASSES, SIDE = 10, 32
KINDS = ("spread", "balanced")


def placing(batch: int, rounds: int, steps: int, launch: Launch, device: torch.device) -> None:
    """Times DML between a ResNet-8 and a ResNet-20, about 1 : 3, in both placements in turn, and tells each from what
    the busiest rank computes: on fewer cores than ranks wall-clock time is the sum of all work, whoever has it.

    Raises:
        ConfigError: the ranks cannot be dealt evenly.
    """
    if launch.world < 4 or launch.world % 2:
        raise ConfigError(f"--nproc-per-node = {launch.world}: expected an even number of ranks, 4 or more")
    busy: dict[str, list[float]] = {kind: [] for kind in KINDS}
    cohorts = {kind: _cohort(kind, batch, launch, device) for kind in KINDS}
    variants = {kind: _step(cohort, busy[kind]) for kind, cohort in cohorts.items()}
    times = in_turn(variants, rounds, steps, device)
    most = torch.tensor([statistics.median(busy[kind]) for kind in KINDS])
    dist.all_reduce(most, dist.ReduceOp.MAX)
    if launch.rank:
        return
    costs = costs_of(cohorts["spread"].config)
    groups = {kind: [len(group.ranks) for group in cohort.placement.groups] for kind, cohort in cohorts.items()}
    print(
        f"placement: ResNet-8 and ResNet-20, 1 : {costs[1] / costs[0]:.2f} by operations, {batch} rows of {SIDE} px, "
        f"{launch.world} ranks of one thread, {torch.get_num_threads()} thread here; ranks {groups}"
    )
    print_comparison(times, *KINDS)
    for kind, seconds in zip(KINDS, most.tolist(), strict=True):
        print(f"  {kind:12} {1000 * seconds:8.2f} ms of a core a step on the busiest rank")
    rows = {kind: [len(interval(batch, 1, 0, ranks)) for ranks in counts] for kind, counts in groups.items()}
    expected = {kind: max(c * n for c, n in zip(costs, of, strict=True)) for kind, of in rows.items()}
    print(
        f"  spread / balanced, busiest rank: {most[0] / most[1]:.3f}; by operations: "
        f"{expected['spread'] / expected['balanced']:.3f}"
    )


def _cohort(kind: str, batch: int, launch: Launch, device: torch.device) -> Cohort:
    config = validate(
        {
            "name": "bench",
            "method": {"name": "dml"},
            "peers": [
                {"network": "cifar_resnet8_b", "name": "small"},
                {"network": "cifar_resnet20_b", "name": "large"},
            ],
            "data": {"dataset": "fashion_mnist_subset", "global_batch": batch},
            "train": {"epochs": 1},
            "schedule": {"name": "constant"},
            "placement": {"kind": kind},
        }
    )
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

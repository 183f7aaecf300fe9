"""Two ranks that share one card, a peer on each."""

from __future__ import annotations

import statistics
from dataclasses import replace

from launch.bench.gpu.bench import Bench, spread
from launch.bench.gpu.networks import rounds, tiny
from launch.bench.peers import Workload, bench_cohort, engine_step
from launch.bench.turns import in_turn, ratio


def exchange(bench: Bench) -> None:
    """Peers that teach each other across ranks, against peers that only agree on what to skip."""
    sizes = {
        "ResNet-32, 32 px, 128 rows": Workload("cifar_resnet32_a", 32, 128),
        "ResNet-50, 224 px, 64 rows, bf16": Workload("torchvision/resnet50", 224, 64, "bf16", classes=1000),
    }
    for title, size in sizes.items():
        # Ranks must decide alike, so nothing here looks at the clock.
        work = tiny(bench, size)
        both = {name: replace(work, method={"name": name}) for name in ("dml", "independent")}
        steps = {name: engine_step(bench_cohort(each, bench.device, bench.launch), each) for name, each in both.items()}
        times = in_turn(steps, *rounds(bench), bench.device)
        bench.row(
            title,
            **{f"{name}, ms a step": 1000 * statistics.median(times[name]) for name in both},
            **spread("dml / independent", ratio(times, "dml", "independent")),
        )


def exchange_nccl(bench: Bench) -> None:
    """The same over NCCL, which must have been told to take two ranks on one card."""
    exchange(bench)

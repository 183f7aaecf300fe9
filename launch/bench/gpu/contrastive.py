"""L-MCL at the sizes of the paper's ImageNet form."""

from __future__ import annotations

import statistics

import torch

from launch.bench.contrast import Shapes, ours, stepper
from launch.bench.gpu.bench import Bench, spread
from launch.bench.gpu.networks import free, rounds, tiny
from launch.bench.peers import Workload
from launch.bench.turns import in_turn, ratio, timed


def lmcl(bench: Bench) -> None:
    """The objective with two peers of four exits, then a step with an outer one and without."""
    rows, images, negatives = (4, 2_000, 32) if bench.quick else (256, 1_280_000, 8192)
    shapes = Shapes(rows, 0.07, bench.device, images, negatives)
    objective = ours(shapes)
    timed(objective, 1, bench.device)
    memory = {}
    if bench.device.type == "cuda":
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        timed(objective, 1, bench.device)
        memory = {"peak memory above the inputs, GiB": (torch.cuda.max_memory_allocated() - before) / 2**30}
    seconds = statistics.median(timed(objective, 1, bench.device) for _ in range(2 if bench.quick else 9))
    what = f"objective, {rows} rows, {negatives:,} negatives, banks of {images:,}"
    bench.row(what, **{"ms a step": 1000 * seconds}, **memory)
    del shapes, objective
    free()

    apart = tiny(bench, Workload("cifar_resnet32_a", 32, 128, method={"name": "independent"}))
    forms = {"without an outer step": None, "with an outer step": 1}
    steps = {"apart": stepper(apart, bench.device)[0]}
    for name, interval in forms.items():
        work = tiny(bench, Workload("cifar_resnet32_a", 32, 128, method={"name": "lmcl", "meta_interval": interval}))
        steps[name] = stepper(work, bench.device)[0]
    times = in_turn(steps, *rounds(bench), bench.device, bench.until())
    for name in forms:
        bench.row(
            f"a step of two ResNet-32 {name}",
            **{"ms a step": 1000 * statistics.median(times[name])},
            **spread("over independent", ratio(times, name, "apart")),
        )

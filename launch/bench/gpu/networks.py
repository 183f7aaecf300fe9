"""The engine's step of networks as they are trained, against a bare loop of the same."""

from __future__ import annotations

import gc
import statistics
import time
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch

from launch.bench.gpu.bench import Bench, spread
from launch.bench.peers import Workload, bare_step, bench_cohort, engine_step
from launch.bench.turns import in_turn, ratio

Step = Callable[[], object]


def tiny(bench: Bench, work: Workload) -> Workload:
    """The same at a toy size, where the command is only tried."""
    return replace(work, network="cifar_resnet8_b", size=16, batch=8) if bench.quick else work


def rounds(bench: Bench) -> tuple[int, int]:
    """Rounds, and steps in one timing."""
    return (2, 1) if bench.quick else (7, 4)


def resnet50_eager(bench: Bench) -> None:
    """One ResNet-50 and two, as they are."""
    work = tiny(bench, Workload("torchvision/resnet50", 224, 256, "bf16", classes=1000))
    alone = replace(work, peers=1, method={"name": "independent"})
    _against(bench, "1 peer", alone, {"bare loop": alone, "engine": alone}, bench.until(0.3), {})
    free()
    both = replace(work, method={"name": "independent"})
    kinds = {"bare loop, DML": work, "engine, DML": work, "bare loop, apart": both, "engine, apart": both}
    _against(bench, "2 peers", work, kinds, bench.until(), {})


def resnet50_compiled(bench: Bench) -> None:
    """One ResNet-50 and two, compiled; what has been compiled once is found again."""
    if bench.quick:
        torch._dynamo.config.disable = True
        bench.row("note", note="the compiler is off at toy sizes")
    work = tiny(bench, Workload("torchvision/resnet50", 224, 256, "bf16", compile=True, classes=1000))
    alone = replace(work, peers=1, method={"name": "independent"})
    _against(bench, "1 peer", alone, {"bare loop": alone, "engine": alone}, bench.until(0.6), {})
    free()
    both = replace(work, method={"name": "independent"})
    ready: dict[str, Step] = {}
    for kinds in ({"bare loop, DML": work, "engine, DML": work}, {"engine, DML": work, "engine, apart": both}):
        if bench.left() < 25 and not bench.quick:
            bench.row(f"2 peers, {' and '.join(kinds)}", note="not run: no time is left")
            return
        _against(bench, "2 peers", work, kinds, bench.until(0.8), ready)


def resnet32(bench: Bench) -> None:
    """Small networks, of which the host cannot hand over the work fast enough."""
    for done, peers in enumerate((2, 4, 8)):
        work = tiny(bench, Workload("cifar_resnet32_a", 32, 128, peers=peers))
        alone = replace(work, peers=1, method={"name": "independent"})
        steps = {"engine, DML": _engine(bench, work), "bare loop, DML": bare_step(work, bench.device)}
        steps["one bare network"] = bare_step(alone, bench.device)
        times = in_turn(steps, *rounds(bench), bench.device, bench.until((0.25, 0.4, 1.0)[done]))
        single = statistics.median(times["one bare network"])
        for name in ("engine, DML", "bare loop, DML"):
            seconds = statistics.median(times[name])
            found: dict[str, Any] = {"ms a step": 1000 * seconds, "images/s": work.batch / seconds}
            found["of K runs one by one"] = seconds / (peers * single)
            if name == "engine, DML":
                found |= spread("engine / bare", ratio(times, name, "bare loop, DML"))
            bench.row(f"{peers} peers, {name}", **found)
        bench.row("one bare network", **{"ms a step": 1000 * single, "images/s": work.batch / single})
        del steps
        free()


def _engine(bench: Bench, work: Workload) -> Step:
    return engine_step(bench_cohort(work, bench.device, bench.launch), work)


def _against(
    bench: Bench, title: str, work: Workload, kinds: dict[str, Workload], until: float, ready: dict[str, Step]
) -> None:
    """Rows of the variants, by turns; the names say which are bare loops. Those that are `ready` have been warm and
    have had their row; the others are added to them."""
    found: dict[str, dict[str, Any]] = {}
    for name, each in kinds.items():
        if name not in ready:
            build = (lambda w: bare_step(w, bench.device)) if name.startswith("bare") else (lambda w: _engine(bench, w))
            ready[name], found[name] = _warm(bench, build, each)
    times = in_turn({name: ready[name] for name in kinds}, *rounds(bench), bench.device, until)
    for name in kinds:
        seconds = statistics.median(times[name])
        row: dict[str, Any] = {"images/s": work.batch / seconds, "ms a step": 1000 * seconds, **found.get(name, {})}
        bare, apart = name.replace("engine", "bare loop"), "engine, apart"
        if name.startswith("engine") and bare in kinds:
            row |= spread("speed over the bare loop", ratio(times, bare, name))
        if name == "engine, DML" and apart in kinds:
            row |= spread("time over peers apart", ratio(times, name, apart))
        bench.row(f"{title}, {name}", **row)


def _warm(bench: Bench, build: Callable[[Workload], Step], work: Workload) -> tuple[Step, dict[str, Any]]:
    """A step that has run a few times; how long the first took, and how much memory one takes."""
    cuda = bench.device.type == "cuda"
    before = torch.cuda.memory_allocated() if cuda else 0
    begin = time.perf_counter()
    step = build(work)
    step()
    if cuda:
        torch.cuda.synchronize()
    found: dict[str, Any] = {"first step, s": time.perf_counter() - begin}
    step()
    if cuda:
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        step()
        torch.cuda.synchronize()
        found["peak memory, GiB"] = (torch.cuda.max_memory_allocated() - before) / 2**30
    return step, found


def free() -> None:
    """Gives back the memory of networks that are gone; they have cycles."""
    gc.collect()
    if torch.cuda.is_initialized():
        torch.cuda.empty_cache()

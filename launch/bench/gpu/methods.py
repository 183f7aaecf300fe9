"""Every method's step, and what a step costs the host."""

from __future__ import annotations

import statistics
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import torch

from engine.ranks.collectives import Launch
from engine.training.timing import Clock
from launch.bench.gpu.bench import Bench, spread
from launch.bench.gpu.networks import free, rounds, tiny
from launch.bench.host import host_seconds, operations
from launch.bench.peers import Workload, bare_step, bench_cohort, engine_step
from launch.bench.turns import in_turn, ratio
from losses import METHODS

_MEMORY = {"negatives": "memory", "num_negatives": 4096}

FORMS: dict[str, dict[str, Any]] = {
    **{name: {"name": name} for name in METHODS if name not in ("independent", "lmcl")},
    "dml, one after another": {"name": "dml", "order": "sequential"},
    "okddip, networks apart": {"name": "okddip", "form": "network"},
    "kdcl, linear": {"name": "kdcl", "ensemble": "linear"},
    "mcl, own batch": {"name": "mcl", "negatives": "batch"},
    "mcl, memory": {"name": "mcl", **_MEMORY},
    "lmcl, no outer step": {"name": "lmcl", "meta_interval": None},
    "lmcl, memory, no outer step": {
        "name": "lmcl",
        "meta_interval": None,
        "negatives": "memory",
        "num_negatives": 4096,
    },
}
"""The sections `method` that are measured."""


def methods(bench: Bench) -> None:
    """Each method against peers that learn alone, as many; a method that fails leaves the others to run."""
    base = tiny(bench, Workload("cifar_resnet32_a", 32, 128))
    for done, (name, section) in enumerate(FORMS.items()):
        if bench.left() < 5:
            bench.row(name, note="not run: no time is left")
            continue
        small = {"num_negatives": 8} if bench.quick and "num_negatives" in section else {}
        peers = 3 if section["name"] == "okddip" else 2
        work = replace(base, method={**section, **small}, peers=peers)
        try:
            _method(bench, name, work, bench.until(1 / (len(FORMS) - done)))
        except Exception as error:
            bench.row(name, note=f"{type(error).__name__}: {' '.join(str(error).split())[:300]}")
        free()


def _method(bench: Bench, name: str, work: Workload, until: float) -> None:
    apart = replace(work, method={"name": "independent"})
    cohort = bench_cohort(work, bench.device, bench.launch)
    clock = Clock(bench.device)
    alone = engine_step(bench_cohort(apart, bench.device, bench.launch), apart)
    engine = engine_step(cohort, work, clock)

    def step() -> None:
        clock.mark("elsewhere")
        engine()

    times = in_turn({name: step, "independent": alone}, *rounds(bench), bench.device, until)
    parts = {part: value for part, value in clock.read().items() if part != "elsewhere"}
    total = sum(parts.values())
    bench.row(
        f"{name}, {work.peers} peers",
        **{"ms a step": 1000 * statistics.median(times[name])},
        **spread("over independent", ratio(times, name, "independent")),
        where=", ".join(f"{part} {100 * value / total:.0f} %" for part, value in parts.items()),
    )


def operations_of_methods(
    work: Workload, device: torch.device, launch: Launch, forms: int | None = None
) -> Iterator[tuple[str, int, int]]:
    """Name, operations that a step of each method dispatches, and those of as many independent peers."""
    alone: dict[int, int] = {}
    for name, section in list(FORMS.items())[:forms]:
        peers = 3 if section["name"] == "okddip" else 2
        found = []
        for method in [section] if peers in alone else [section, {"name": "independent"}]:
            each = replace(work, method=method, peers=peers)
            step = engine_step(bench_cohort(each, device, launch), each)
            step()
            found.append(operations(step))
            free()
        alone.setdefault(peers, found[-1])
        yield f"{name}, {peers} peers", found[0], alone[peers]


def host(bench: Bench) -> None:
    """Operations that a step dispatches, and how long the host is busy with it, engine and bare loop; then the
    operations of every method."""
    base = tiny(bench, Workload("cifar_resnet32_a", 32, 128))
    for peers in (2,) if bench.quick else (2, 8):
        for method in ("independent", "dml"):
            work = replace(base, peers=peers, method={"name": method})
            cohort = bench_cohort(work, bench.device, bench.launch)
            found = {}
            for name, step in (("engine", engine_step(cohort, work)), ("bare loop", bare_step(work, bench.device))):
                for _ in range(2):
                    step()
                busy = statistics.median(host_seconds(step, bench.device) for _ in range(3 if bench.quick else 15))
                found[name] = operations(step), busy
                extra = {}
                if name == "bare loop":
                    ours, bare = found["engine"], found["bare loop"]
                    extra = {"engine / bare, operations": ours[0] / bare[0], "engine / bare, host": ours[1] / bare[1]}
                bench.row(
                    f"{peers} peers, {method}, {name}",
                    **{"operations": found[name][0], "host, ms": 1000 * found[name][1]},
                    **extra,
                )
            free()
    for name, found_now, alone in operations_of_methods(base, bench.device, bench.launch, 3 if bench.quick else None):
        bench.row(name, **{"operations": found_now, "over independent, operations": found_now / alone})
        if bench.left() < 3:
            break

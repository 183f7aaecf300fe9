"""Timing variants in turn."""

from __future__ import annotations

import platform
import statistics
import time
from collections.abc import Callable, Mapping
from typing import NamedTuple

import torch
import torch.distributed as dist

from engine.ranks.collectives import Launch
from launch.bench.peers import Workload

Times = dict[str, list[float]]
"""Seconds of one step of each variant, round by round."""


class Quartiles(NamedTuple):
    """Of ratios or times."""

    low: float
    middle: float
    high: float


def quartiles(numbers: list[float]) -> Quartiles:
    """Of two numbers or more."""
    return Quartiles(*statistics.quantiles(numbers, n=4, method="inclusive"))


def in_turn(
    variants: Mapping[str, Callable[[], object]],
    rounds: int,
    steps: int,
    device: torch.device,
    until: float = float("inf"),
) -> Times:
    """Times the variants in turn, so that a machine that wanders favours none; a first round warms up.

    Args:
        rounds: timings of each variant, at least two.
        steps: in one timing.
        until: `time.monotonic()` after which no round is begun, the first three apart. One rank alone may have this.
    """
    times: Times = {name: [] for name in variants}
    for done in range(rounds + 1):
        if done > 3 and time.monotonic() > until:
            break
        # Who goes first changes, so that a drift of the machine favours neither.
        for name in list(variants)[:: 1 if done % 2 else -1]:
            seconds = timed(variants[name], steps, device)
            if done:
                times[name].append(seconds / steps)
    return times


_READY_AHEAD = 4
"""Steps whose batches a loader's workers may have prepared while it was not its turn: two for each of two."""


def loading_in_turn(variants: Mapping[str, Callable[[], object]], rounds: int, steps: int) -> Times:
    """As `in_turn`, but what workers prepare while it is not their turn neither counts for them nor takes anything
    from the other: before each timing come a pause and steps that use up what lay ready."""
    times: Times = {name: [] for name in variants}
    for done in range(rounds + 1):
        for name in list(variants)[:: 1 if done % 2 else -1]:
            time.sleep(0.2)
            for _ in range(_READY_AHEAD if steps > 1 else 0):
                variants[name]()
            begin = time.perf_counter()
            for _ in range(steps):
                variants[name]()
            if done:
                times[name].append((time.perf_counter() - begin) / steps)
    return times


def ratio(times: Times, one: str, other: str) -> Quartiles:
    """Quartiles of the ratios of neighbours, of the first variant to the second."""
    return quartiles([a / b for a, b in zip(times[one], times[other], strict=True)])


def print_comparison(times: Times, one: str, other: str) -> None:
    """The median of each variant, and the ratio."""
    for name, measured in times.items():
        print(f"  {name:12} {1000 * statistics.median(measured):8.2f} ms a step (median of {len(measured)})")
    low, middle, high = ratio(times, one, other)
    print(f"  {one} / {other}: {middle:.3f} (quartiles {low:.3f} to {high:.3f})")


def headline(what: str, work: Workload, device: torch.device, launch: Launch) -> str:
    """What was measured, on what."""
    where = torch.cuda.get_device_name(device) if device.type == "cuda" else f"CPU, {torch.get_num_threads()} threads"
    return (
        f"{what}: {work.peers} x {work.network}, {work.size} px, {work.batch} rows, {work.amp}, "
        f"{launch.world} ranks, {where}, torch {torch.__version__}, {platform.machine()}"
    )


def timed(step: Callable[[], object], steps: int, device: torch.device) -> float:
    """Seconds for so many steps, begun by all ranks together."""
    if device.type == "cuda":
        torch.cuda.synchronize()
    dist.barrier()
    begin = time.perf_counter()
    for _ in range(steps):
        step()
    if device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - begin

"""Timing variants in turn."""

from __future__ import annotations

import argparse
import platform
import statistics
import time
from collections.abc import Callable

import torch
import torch.distributed as dist

from engine.ranks.collectives import Launch


def compare(
    variants: dict[str, Callable[[], object]], options: argparse.Namespace, device: torch.device, launch: Launch
) -> None:
    """Times two variants in turn and prints the ratio of the first to the second."""
    times: dict[str, list[float]] = {name: [] for name in variants}
    for done in range(options.rounds + 1):
        # Who goes first changes, so that a drift of the machine favours neither.
        for name in list(variants)[:: 1 if done % 2 else -1]:
            seconds = timed(variants[name], options.steps, device)
            if done:  # the first round warms up
                times[name].append(seconds / options.steps)
    one, other = variants
    ratios = [a / b for a, b in zip(times[one], times[other], strict=True)]
    low, middle, high = statistics.quantiles(ratios, n=4)
    if launch.rank == 0:
        print(headline(options, device, launch))
        for name, measured in times.items():
            print(f"  {name:12} {1000 * statistics.median(measured):8.2f} ms a step (median of {len(measured)})")
        print(f"  {one} / {other}: {middle:.3f} (quartiles {low:.3f} to {high:.3f})")


def headline(options: argparse.Namespace, device: torch.device, launch: Launch) -> str:
    """What was measured, on what."""
    where = torch.cuda.get_device_name(device) if device.type == "cuda" else f"CPU, {torch.get_num_threads()} threads"
    return (
        f"{options.what}: 2 x {options.network}, {options.size} px, {options.batch} rows, {options.amp}, "
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

"""Peers of one network computed as one, against each by itself: `launch/bench together`."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from engine.cohort.cohort import compute_together
from engine.ranks.collectives import Launch
from launch.bench.peers import Workload, bench_cohort, engine_step
from launch.bench.turns import headline, in_turn, ratio

PEERS = 2, 4, 8


class _Computing(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += not (function.is_view or "empty" in str(function) or "profiler" in str(function))
        return function(*args, **(kwargs or {}))


def _computing(step: Callable[[], object]) -> int:
    """Operations without views and without room that is made: on a GPU, kernels."""
    with _Computing() as seen:
        step()
    return seen.count


def together(work: Workload, rounds: int, steps: int, device: torch.device, launch: Launch) -> None:
    """A line for each number of peers: operations that compute, of a step both ways, and the ratio of the times."""
    print(headline("together", replace(work, peers=PEERS[-1]), device, launch))
    for peers in PEERS:
        each = replace(work, peers=peers)
        cohort = bench_cohort(each, device, launch)
        cohort.together = compute_together(cohort)
        variants = {
            "together": engine_step(cohort, each),
            "one by one": engine_step(bench_cohort(each, device, launch), each),
        }
        times = in_turn(variants, rounds, steps, device)
        low, middle, high = ratio(times, "one by one", "together")
        counts = {name: _computing(step) for name, step in variants.items()}
        print(
            f"  {peers} peers: {counts['one by one']:,} operations one by one, {counts['together']:,} together; "
            f"one by one / together: {middle:.3f} (quartiles {low:.3f} to {high:.3f})"
        )

"""Peers of one network computed as one, against each by itself: `launch/bench together`."""

from __future__ import annotations

from dataclasses import replace

import torch

from engine.cohort.cohort import compute_together
from engine.ranks.collectives import Launch
from launch.bench.host import computing_operations
from launch.bench.peers import Workload, bench_cohort, engine_step
from launch.bench.turns import headline, in_turn, ratio

PEERS = 2, 4, 8


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
        counts = {name: computing_operations(step) for name, step in variants.items()}
        print(
            f"  {peers} peers: {counts['one by one']:,} operations one by one, {counts['together']:,} together; "
            f"one by one / together: {middle:.3f} (quartiles {low:.3f} to {high:.3f})"
        )

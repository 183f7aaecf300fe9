"""`python launch/bench checkpoint`: saving beside training, against waiting for the disk."""

from __future__ import annotations

import statistics
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import torch
import torch.distributed as dist

from engine.cohort.cohort import Cohort
from engine.ranks.collectives import Launch
from engine.safety.checkpoint import Standing
from engine.safety.saving import Saver
from launch.bench.peers import Workload, bench_cohort, engine_step
from launch.bench.turns import Quartiles, headline, quartiles, timed

KINDS = ("no save", "beside", "waited for")


@dataclass
class Stall:
    """Seconds, round by round, of steps with a save at their start."""

    megabytes: float
    """Of a checkpoint."""
    whole: dict[str, list[float]] = field(default_factory=lambda: {kind: [] for kind in KINDS})
    """Of a round of each kind."""
    held: dict[str, list[float]] = field(default_factory=lambda: {kind: [] for kind in KINDS})
    """Of a save, until training goes on."""
    during: list[float] = field(default_factory=list)
    """Of a step begun while files are written, and"""
    plain: list[float] = field(default_factory=list)
    """while none are."""

    def in_steps(self, kind: str) -> float:
        """What a save holds training up for."""
        return statistics.median(self.held[kind]) / statistics.median(self.plain)

    def extra(self, kind: str) -> Quartiles:
        """What a round takes more than one without a save, slower steps included."""
        return quartiles([a - b for a, b in zip(self.whole[kind], self.whole[KINDS[0]], strict=True)])


def stall(cohort: Cohort, step: Callable[[], object], run: Path, rounds: int, steps: int, until: float) -> Stall:
    """Times steps with a save at the start of each round: written beside them, waited for, and none, in turn.

    Args:
        run: an empty folder, the same on all ranks.
        until: `time.monotonic()` after which no round is begun, the first three apart; infinite with several ranks.
    """
    found, device = Stall(0.0), cohort.device
    saver = Saver(run, cohort, print)
    for done in range(rounds + 1):
        if done > 3 and time.monotonic() > until:
            break
        for kind in KINDS[:: 1 if done % 2 else -1]:
            seconds, held = 0.0, 0.0
            if kind != "no save":
                held = seconds = timed(partial(save, saver, done, wait=kind == "waited for"), 1, device)
            for _ in range(steps):
                writing = saver.writing
                seconds += (one := timed(step, 1, device))
                if done and kind != "waited for":
                    (found.during if writing else found.plain).append(one)
            saver.wait()
            if done:  # the first round warms up
                found.whole[kind].append(seconds)
                found.held[kind].append(held)
    found.megabytes = sum(path.stat().st_size for path in run.rglob("*.pt")) / 1e6
    saver.close()
    return found


def saving(work: Workload, rounds: int, steps: int, folder: Path | None, device: torch.device, launch: Launch) -> None:
    """Prints what a save costs."""
    cohort = bench_cohort(work, device, launch)
    with tempfile.TemporaryDirectory(dir=folder) as name:
        shared = [name]
        dist.broadcast_object_list(shared, src=0)
        found = stall(cohort, engine_step(cohort, work), Path(shared[0]), rounds, steps, float("inf"))
    if launch.rank:
        return
    usual = statistics.median(found.plain)
    print(f"{headline('checkpoint', work, device, launch)}; {found.megabytes:.0f} MB a checkpoint")
    print(f"  a step while nothing is written: {1000 * usual:.1f} ms (median of {len(found.plain)})")
    if found.during:
        slower = statistics.median(found.during) / usual
        print(f"  a step begun while files are written: {slower:.3f} times that (median of {len(found.during)})")
    for kind in KINDS[1:]:
        held = statistics.median(found.held[kind])
        print(f"  {kind:10} a save holds training up for {1000 * held:8.1f} ms, {found.in_steps(kind):.2f} steps")
        low, middle, high = (1000 * x for x in found.extra(kind))
        print(f"  {'':10} in all, slower steps included, {middle:.1f} ms (quartiles {low:.1f} to {high:.1f})")


def save(saver: Saver, step: int, *, wait: bool) -> None:
    """One checkpoint, written beside training or waited for."""
    saver.save(Standing(step, None, 0, {}, 0), keep=1)
    if wait:
        saver.wait()

"""`python launch/bench checkpoint`: saving beside training, against waiting for the disk."""

from __future__ import annotations

import argparse
import statistics
import tempfile
from functools import partial
from pathlib import Path

import torch
import torch.distributed as dist

from engine.ranks.collectives import Launch
from engine.safety.checkpoint import Standing
from engine.safety.saving import Saver
from launch.bench.peers import bench_cohort, engine_step
from launch.bench.turns import headline, timed


def saving(options: argparse.Namespace, device: torch.device, launch: Launch) -> None:
    """Times steps with a save at the start of each round: written beside them, waited for, and none, in turn."""
    cohort = bench_cohort(options, "dml", device, launch)
    step = engine_step(cohort, options)
    kinds = ("no save", "beside", "waited for")
    rounds: dict[str, list[float]] = {kind: [] for kind in kinds}
    blocked: dict[str, list[float]] = {kind: [] for kind in kinds}
    during: list[float] = []
    plain: list[float] = []
    with tempfile.TemporaryDirectory(dir=options.folder) as name:
        shared = [name]
        dist.broadcast_object_list(shared, src=0)
        run = Path(shared[0])
        saver = Saver(run, cohort, print)
        for done in range(options.rounds + 1):
            for kind in kinds[:: 1 if done % 2 else -1]:
                seconds, held = 0.0, 0.0
                if kind != "no save":
                    held = seconds = timed(partial(save, saver, done, wait=kind == "waited for"), 1, device)
                for _ in range(options.steps):
                    writing = saver.writing
                    seconds += (one := timed(step, 1, device))
                    if done and kind != "waited for":
                        (during if writing else plain).append(one)
                saver.wait()
                if done:  # the first round warms up
                    rounds[kind].append(seconds)
                    blocked[kind].append(held)
        size = sum(path.stat().st_size for path in run.rglob("*.pt"))
        saver.close()
    if launch.rank:
        return
    usual = statistics.median(plain)
    print(f"{headline(options, device, launch)}; {size / 1e6:.0f} MB a checkpoint")
    print(f"  a step while nothing is written: {1000 * usual:.1f} ms (median of {len(plain)})")
    if during:
        slower = statistics.median(during) / usual
        print(f"  a step begun while files are written: {slower:.3f} times that (median of {len(during)})")
    for kind in kinds[1:]:
        held = statistics.median(blocked[kind])
        print(f"  {kind:10} a save holds training up for {1000 * held:8.1f} ms, {held / usual:.2f} steps")
        extra = [a - b for a, b in zip(rounds[kind], rounds["no save"], strict=True)]
        low, middle, high = (1000 * x for x in statistics.quantiles(extra, n=4))
        print(f"  {'':10} in all, slower steps included, {middle:.1f} ms (quartiles {low:.1f} to {high:.1f})")


def save(saver: Saver, step: int, *, wait: bool) -> None:
    """One checkpoint, written beside training or waited for."""
    saver.save(Standing(step, None, 0, {}, 0), keep=1)
    if wait:
        saver.wait()

"""What stands in a line of metrics, and what of it the bar and the log show."""

from __future__ import annotations

import resource
from collections.abc import Mapping
from dataclasses import dataclass
from signal import Signals
from typing import Any

import torch
from torch import Tensor

from engine.cohort.compiling import compiled_so_far
from engine.config import RunConfig
from engine.reporting.tracking import Tracker
from engine.safety.health import CODES, Collapse, Signs, named
from engine.training.meter import Key, Reading


@dataclass(frozen=True)
class Stretch:
    """The steps that a line of metrics is about: those after step `begin`, up to step `end`."""

    begin: int
    end: int
    epoch: float
    """At its end."""
    seconds: float
    """That these steps took, and"""
    parts: Mapping[str, float]
    """those of each part of a step, in all."""
    left_out: int
    """Steps whose update a rollback leaves out."""
    lr: float
    """The learning rate of the last."""


def training_line(config: RunConfig, stretch: Stretch, reading: Reading, signs: Signs) -> dict[str, Any]:
    """A line about training, from the reading of its steps: the mean of each term and of the norm of each gradient over
    the updates that were made (NaN where there was none), signs of trouble, speed in images (of all ranks, however many
    peers see them) and where the time of a step went."""
    names = [name for name, _ in config.cohort]
    columns: dict[Key, Tensor] = {**reading.terms, **{(k, "grad_norm"): norm for k, norm in reading.norms.items()}}
    means = {key: columns[key].nanmean().item() for key in sorted(columns, key=str)}
    steps = stretch.end - stretch.begin
    return {
        "epoch": stretch.epoch,
        "lr": stretch.lr,
        **{f"train/{named(names, k)}/{name}": mean for (k, name), mean in means.items()},
        "train/skipped": reading.skipped,
        **({"health/left_out": stretch.left_out} if stretch.left_out else {}),
        **{f"health/{spike.name}/spikes": spike.count for spike in signs.spikes},
        **_collapses(signs.dead),
        "speed/images_per_second": steps * config.data.global_batch / stretch.seconds,
        **{f"speed/{part}_ms": 1000 * seconds / steps for part, seconds in stretch.parts.items()},
    }


def report_training(tracker: Tracker, config: RunConfig, stretch: Stretch, reading: Reading, signs: Signs) -> None:
    """Keeps a line about training, and shows the mean loss of the peers that this run trains, and the speed."""
    line = training_line(config, stretch, reading, signs) | {"speed/peak_mib": peak_mib()}
    if (compiled := compiled_so_far()) is not None:
        line["speed/compiled_s"] = compiled.seconds
    tracker.write(stretch.end, line)
    loss = sum(values.nanmean().item() for values in reading.terms.values()) / len(config.learners)
    images = f"{line['speed/images_per_second']:.0f}/s"
    tracker.progress(stretch.end, lr=f"{stretch.lr:.3g}", loss=f"{loss:.3f}", images=images)
    if reading.skipped:
        tracker.say(f"step {stretch.end}: {reading.skipped} updates skipped since the last line: non-finite numbers")


def peak_mib() -> float:
    """The most memory that this rank has had: of its GPU, as torch has allocated it, or of its process."""
    if torch.cuda.is_available() and torch.cuda.is_initialized():
        return torch.cuda.max_memory_allocated() / 2**20
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def report_scores(
    tracker: Tracker, step: int, epoch: float, scores: Mapping[str, float], collapses: Mapping[str, Collapse]
) -> None:
    """Keeps a line about an evaluation, the scores of `evaluate_cohort`, and shows the peers' top-1."""
    tracker.write(step, {"epoch": epoch, **scores, **_collapses(collapses)})
    shown = ", ".join(
        f"{key.split('/')[1]} {value:.2f}"
        for key, value in scores.items()
        if key.endswith("/top1") and key[:3] == "val"
    )
    tracker.say(f"epoch {epoch:.4g}: top-1 % {shown}{tracker.left}")


def report_end(tracker: Tracker, step: int, stopped_by: Signals, saved: bool, seconds: float) -> None:
    """Says that a signal ends the run before its end, `seconds` after it came."""
    tracker.preempted()
    tracker.say(
        f"signal {stopped_by.name} at step {step}: {'saved' if saved else 'NOT saved'}, ended "
        f"{seconds:.1f} s later; start the same command again to go on"
    )


def _collapses(found: Mapping[str, Collapse]) -> dict[str, int]:
    return {f"health/{name}/collapsed": CODES[collapse] for name, collapse in found.items()}

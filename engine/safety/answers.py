"""The answers to numbers that went wrong: to say it, to go back, or to end the run. All ranks give the same."""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass

from engine.config import RunConfig
from engine.safety import rollback
from engine.safety.health import EXPLAINED, Collapse
from engine.safety.rollback import GoBack, Rollback
from engine.safety.spikes import Spike
from engine.training.meter import Reading

Alert = Callable[[str, str], None]
"""Tells a person: a title and a text."""

REMEDIES = "a smaller optimizer.lr, train.clip_norm, schedule.warmup_epochs or precision.amp = bf16"


class TrainingDivergedError(RuntimeError):
    """Too many updates in a row had to be skipped, or numbers went wrong once more after the last rollback."""


@dataclass(frozen=True)
class Trouble:
    """What speaks for going back."""

    first: int
    """The update with which it began, counted from 0."""
    text: str
    ends_run: bool
    """Whether the run must not go on as it is."""


def answer(
    config: RunConfig,
    rollbacks: Sequence[Rollback],
    reading: Reading,
    spikes: Sequence[Spike],
    begin: int,
    step: int,
    alert: Alert | None,
) -> None:
    """To what went wrong in the steps after step `begin`, the last line, up to `step`.

    Args:
        rollbacks: those up to now.
        alert: on rank 0, which also writes down that the run goes back; None elsewhere.

    Raises:
        GoBack: the run is to be built anew.
        TrainingDivergedError: it must not go on.
    """

    def update(place: int) -> int:
        """The update of the reading's step `place`, which is negative where it is from before the reading."""
        made = [i for i in range(begin, step) if not rollback.left_out(rollbacks, i)]
        return made[place] if place >= 0 else rollback.before(rollbacks, begin, -place)

    found = _trouble(config, reading, spikes, update, step)
    if found is not None:
        _act(config, rollbacks, found, begin, step, alert)


def answer_scores(
    config: RunConfig,
    rollbacks: Sequence[Rollback],
    scores: Mapping[str, float],
    begin: int,
    step: int,
    in_a_row: int,
    alert: Alert | None,
) -> None:
    """To an evaluation after step `step` that is no number, as to a loss that is none; else as `answer`.

    Args:
        in_a_row: updates that were skipped up to now, in a row: what went wrong was there before them.
    """
    wrong = [key for key, value in scores.items() if key.startswith("val/") and not math.isfinite(value)]
    if wrong:
        text = f"step {step}: the evaluation gave {wrong[0]} = {scores[wrong[0]]}: the weights have diverged"
        first = min(begin, rollback.before(rollbacks, step, in_a_row))
        _act(config, rollbacks, Trouble(first, text, ends_run=True), begin, step, alert)


def _act(
    config: RunConfig,
    rollbacks: Sequence[Rollback],
    found: Trouble,
    begin: int,
    step: int,
    alert: Alert | None,
) -> None:
    limit = config.health.max_rollbacks
    # The update before may be the one that did it: its own loss was taken before it.
    start = min(begin, rollback.before(rollbacks, found.first))
    if config.health.rollback and len(rollbacks) < limit:
        if alert:
            rollback.write(config.folder, [*rollbacks, Rollback(start, step, found.text)])
            alert(
                "going back",
                f"{found.text}. Going back, leaving out steps {start + 1} to {step}; rollback {len(rollbacks) + 1} of "
                f"at most health.max_rollbacks = {limit}",
            )
        raise GoBack
    if config.health.rollback:
        raise TrainingDivergedError(
            f"{found.text}. The run has gone back {len(rollbacks)} times; the limit is health.max_rollbacks = {limit}. "
            f"Try {REMEDIES}"
        )
    if found.ends_run:
        before = f"Checkpoints of up to step {start} are from before" if start else "No checkpoint is from before"
        raise TrainingDivergedError(f"{found.text}. {before}; try {REMEDIES}")
    if alert:
        alert("loss spike", f"{found.text}. Should it stay: try {REMEDIES}, or health.rollback = true")


def _trouble(
    config: RunConfig, reading: Reading, spikes: Sequence[Spike], update: Callable[[int], int], step: int
) -> Trouble | None:
    """The worst of what went wrong up to `step`, since the last line.

    Args:
        update: gives the number of an update, counted from 0, for its place in the reading.
    """
    begin, longest = reading.longest
    if longest >= config.train.max_skipped:
        return Trouble(
            update(begin),
            f"{longest} updates in a row met a non-finite loss or gradient, up to step {step}; the limit is "
            f"train.max_skipped = {config.train.max_skipped}",
            ends_run=True,
        )
    if not spikes:
        return None
    spike = min(spikes, key=lambda spike: spike.step)
    first = update(spike.step)
    return Trouble(
        first,
        f"step {first + 1}: the loss of {spike.name} is {spike.loss:.4g}, the median of the steps before was "
        f"{spike.usual:.4g}; {spike.count} such steps up to step {step}; see health.spike_factor = "
        f"{config.health.spike_factor:g}",
        ends_run=False,
    )


Told = frozenset[tuple[str, Collapse]]
"""The collapses that have been said: the peer, and how."""


def tell_collapses(
    found: Mapping[str, Collapse], looked_for: Collection[Collapse], told: Told, step: int, alert: Alert | None
) -> Told:
    """Says which peers have collapsed, each once until it has recovered. Returns: what has been said by now."""
    for name, collapse in found.items():
        if (name, collapse) not in told and alert:
            alert(f"{name} collapsed", f"step {step}: {name} has collapsed, {collapse}: {EXPLAINED[collapse]}")
    return frozenset(one for one in told if one[1] not in looked_for) | frozenset(found.items())

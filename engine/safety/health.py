"""Numbers that go wrong while they are finite: losses that jump, and peers that no longer learn.

All is decided from numbers that are the same on every rank, where the host has them anyway: at lines of metrics and at
evaluations. So all ranks decide alike, and looking costs no collective and no wait of its own.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from statistics import median
from typing import Literal

from engine.config import HealthConfig
from engine.training.meter import Reading

ALIKE = 1e-4
"""What differs by less than 1 % of itself (here squared) counts as the same: the probabilities that a peer gives to two
images, the logits that two peers give to one. docs/measurements.md has what healthy peers show."""


@dataclass(frozen=True)
class Spike:
    """A step in which the loss of a peer is many times what it was."""

    name: str
    """The peer; `cohort` for the terms that belong to all."""
    step: int
    """Counted from the first that was given."""
    loss: float
    usual: float
    """The median of the steps before."""
    count: int
    """Steps of this peer that are spikes, this being the first."""


class LossWatch:
    """Compares the loss of each step with the median of those before it, spikes among them: where a loss stays high
    (a method's next phase), that is soon the usual."""

    def __init__(self, config: HealthConfig, recent: Mapping[str, Sequence[float]]) -> None:
        self._config = config
        self._recent = {name: deque(losses, config.spike_window) for name, losses in recent.items()}

    @property
    def recent(self) -> dict[str, list[float]]:
        """What it remembers, for a checkpoint."""
        return {name: list(losses) for name, losses in self._recent.items()}

    def spikes(self, losses: Mapping[str, Sequence[float]]) -> list[Spike]:
        """The first spike of each peer that has any, and how many there are.

        Args:
            losses: of the steps since the last call, in order; NaN where the update was skipped.
        """
        found = []
        for name, steps in losses.items():
            recent = self._recent.setdefault(name, deque(maxlen=self._config.spike_window))
            high = []
            for step, loss in enumerate(steps):
                if math.isnan(loss):
                    continue
                usual = median(recent) if recent else math.inf
                if len(recent) >= self._config.spike_window / 2 and self._stands_out(loss, usual, recent):
                    high.append((step, loss, usual))
                recent.append(loss)
            if high:
                found.append(Spike(name, *high[0], count=len(high)))
        return found

    def _stands_out(self, loss: float, usual: float, recent: Collection[float]) -> bool:
        config = self._config
        if config.spike_factor is None or loss <= config.spike_factor * max(usual, config.spike_floor):
            return False
        return loss > usual + config.spike_deviations * median(abs(x - usual) for x in recent)


Collapse = Literal["no gradient", "all images alike", "another's twin"]

CODES: dict[Collapse, int] = {"no gradient": 1, "all images alike": 2, "another's twin": 3}
"""What `health/NAME/collapsed` says."""

EXPLAINED: dict[Collapse, str] = {
    "no gradient": (
        "its gradient was exactly 0 in every step since the last line while its loss was not, so it learns nothing: "
        "dead ReLUs, or with precision.amp = fp16 gradients too small for it (try bf16); try a smaller optimizer.lr, "
        "schedule.warmup_epochs, or other initial weights"
    ),
    "all images alike": (
        "it gave all validation images the same probabilities at two evaluations in a row: try a smaller "
        "optimizer.lr, schedule.warmup_epochs, train.clip_norm, or other initial weights"
    ),
    "another's twin": (
        "its logits are another peer's, on all validation images, so the two have nothing to teach each other: let "
        "them differ, by peers.N.network, peers.N.pretrained or data.views = per_peer"
    ),
}


LINES_SHOW: tuple[Collapse, ...] = ("no gradient",)
"""What is looked for at a line of metrics, and"""
SCORES_SHOW: tuple[Collapse, ...] = ("all images alike", "another's twin")
"""at an evaluation."""


def named(names: Sequence[str], k: int | None) -> str:
    """What peer k is called, and what belongs to all of them (None)."""
    return "cohort" if k is None else names[k]


@dataclass(frozen=True)
class Signs:
    """What the steps between two lines of metrics show."""

    spikes: list[Spike]
    dead: dict[str, Collapse]
    """Peers that nothing moves."""


def examine(reading: Reading, watch: LossWatch, names: Sequence[str]) -> Signs:
    """Looks at the steps of a reading, which the watch remembers. `names` are those of all K peers."""
    losses = {named(names, k): values for k, values in reading.losses().items()}
    return Signs(watch.spikes(losses), without_gradient(reading, names))


def without_gradient(reading: Reading, names: Sequence[str]) -> dict[str, Collapse]:
    """Peers that no step since the last line has moved, though their loss is above 0. One that knows every image by
    heart has both at 0, and is well."""
    losses = reading.losses()
    found: dict[str, Collapse] = {}
    for k, name in enumerate(names):
        if k not in reading.norms or k not in losses:
            continue
        norms = reading.norms[k].tolist()
        made = [(norm, loss) for norm, loss in zip(norms, losses[k], strict=True) if not math.isnan(norm)]
        if made and all(norm == 0 and loss > 0 for norm, loss in made):
            found[name] = "no gradient"
    return found


def collapsed(
    values: Mapping[str, float], before: Mapping[str, float] | None, names: Sequence[str]
) -> dict[str, Collapse]:
    """Peers that an evaluation shows to have collapsed.

    One look is not enough to say that all images are alike: in the first evaluations of a deep network with BatchNorm
    the running statistics may not be there yet, and every image gets the same for that reason alone.

    Args:
        values: as of `evaluate_cohort`.
        before: those of the evaluation before, if there was one.
        names: of the peers.
    """
    found: dict[str, Collapse] = {}
    for name in names:
        spreads = [one[f"val/{name}/spread"] for one in (before, values) if one is not None]
        if len(spreads) == 2 and max(spreads) < ALIKE:
            found[name] = "all images alike"
        elif len(names) > 1 and values[f"val/{name}/apart"] < ALIKE:
            found[name] = "another's twin"
    return found

"""Numbers that go wrong while they are finite: losses that jump, and peers that no longer learn.

All is decided from numbers that are the same on every rank, where the host has them anyway: at lines of metrics and at
evaluations. So all ranks decide alike, and looking costs no collective and no wait of its own.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from engine.safety.spikes import LossWatch, Spike
from engine.training.meter import Reading

ALIKE = 1e-4
"""What differs by less than 1 % of itself (here squared) counts as the same: the probabilities that a peer gives to two
images, the logits that two peers give to one. docs/measurements.md has what healthy peers show."""


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

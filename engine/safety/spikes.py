"""Losses that jump: the loss of a step against the median of those before it.

All is decided from numbers that are the same on every rank, where the host has them anyway, so all ranks decide alike.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from statistics import median

from engine.config import HealthConfig


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

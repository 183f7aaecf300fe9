"""The learning rate as a function of the updates done, in timm's words.

timm's own schedules are not used: it takes longer to import than torch, and a run of our networks needs nothing of it.
"""

from __future__ import annotations

import bisect
import math

import torch

from engine.config import ScheduleConfig


class Schedule:
    """Sets the learning rates of an optimiser.

    Args:
        optimizer: whose rates it sets, each from what it is now; a group's `lr_scale` is a factor of its own.
        config: what it is like.
        steps: updates of the run.
        steps_per_epoch: updates of an epoch, in which milestones and warm-up are counted.
    """

    def __init__(
        self, optimizer: torch.optim.Optimizer, config: ScheduleConfig, steps: int, steps_per_epoch: int
    ) -> None:
        self._optimizer, self._config = optimizer, config
        self._warmup = config.warmup_epochs * steps_per_epoch
        self._length = steps - self._warmup if config.warmup_prefix else steps
        # The rate falls before the first update at or after a milestone; the half keeps rounding from making it the one
        # after.
        epochs = config.falls(steps / steps_per_epoch)
        self._falls = [math.ceil(round(epoch * steps_per_epoch, 6)) - 0.5 for epoch in epochs]
        for group in optimizer.param_groups:
            group.setdefault("initial_lr", group["lr"])
        self._tops: list[float] = [group["initial_lr"] for group in optimizer.param_groups]
        self.step_update(0)

    def step_update(self, update: int) -> None:
        """Sets the rates of update number `update`."""
        for group, top in zip(self._optimizer.param_groups, self._tops, strict=True):
            group["lr"] = self._rate(update, top) * group.get("lr_scale", 1.0)

    def _rate(self, update: float, top: float) -> float:
        config = self._config
        if update < self._warmup:
            return config.warmup_lr + update * ((top - config.warmup_lr) / self._warmup)
        if config.name != "cosine":
            return float(top * config.gamma ** bisect.bisect_right(self._falls, update))
        if config.warmup_prefix:
            update -= self._warmup
        if update >= self._length:
            return config.min_lr
        return config.min_lr + 0.5 * (top - config.min_lr) * (1 + math.cos(math.pi * update / self._length))

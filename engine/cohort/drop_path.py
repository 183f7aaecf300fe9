"""Stochastic depth that changes from epoch to epoch."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from torch import nn

from engine.cohort.peer import Resident
from engine.config.sections import TrainConfig

_RATES = {"DropPath": "drop_prob", "StochasticDepth": "p"}
"""The attribute that is the rate, by class: timm's and ours, torchvision's. By name, so that neither is imported."""


class DropPathSchedule:
    """Multiplies the drop path rates that the networks of peers, and their averages, were built with.

    Args:
        train: `drop_path` has (epoch, factor) pairs, epochs ascending from 0: the factor from the start of that epoch
            on; before the first one it is 1.
        residents: those that learn are changed.
        steps_per_epoch: updates of an epoch.
    """

    def __init__(self, train: TrainConfig, residents: Mapping[int, Resident], steps_per_epoch: int) -> None:
        learners = [r for r in residents.values() if r.optimizer is not None] if train.drop_path else []
        networks = [module for r in learners for module in (r.whole, r.ema) if module is not None]
        found = dict.fromkeys(module for network in networks for module in drop_paths(network))
        self._rates = [(module, float(getattr(module, _rate(module)))) for module in found]
        self._stages, self._steps_per_epoch = train.drop_path, steps_per_epoch
        self._factor = 1.0

    def step_update(self, num_updates: int) -> None:
        """Sets the rates of update `num_updates`, counted from 0."""
        epoch = num_updates // self._steps_per_epoch
        factor = next((factor for first, factor in reversed(self._stages) if first <= epoch), 1.0)
        if factor != self._factor:
            self._factor = factor
            for module, rate in self._rates:
                setattr(module, _rate(module), rate * factor)


def drop_paths(network: nn.Module) -> Iterator[nn.Module]:
    """The parts of a network that drop paths at a rate above 0."""
    return (m for m in network.modules() if type(m).__name__ in _RATES and getattr(m, _rate(m)))


def _rate(module: nn.Module) -> str:
    return _RATES[type(module).__name__]

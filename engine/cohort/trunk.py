"""The part of the network that all peers share: every rank runs it, and its gradient is that of all peers."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from engine.cohort.buffers import floats
from engine.cohort.gradients import scale_gradient
from losses.functional import fill, flat
from models.stages import Taps


@dataclass(frozen=True)
class Trunk:
    """The first stages of every peer's network.

    Attributes:
        module: the stages.
        wrapped: the same, as called in training: it averages gradients over the world.
        taps: what shows their feature maps.
        gradient: what the peers' gradients are multiplied by on their way into the trunk. Averaged over the world,
            those of the groups' peers would count as one group's, and as many times as the group has ranks.
    """

    module: nn.Module
    wrapped: nn.Module
    taps: Taps
    gradient: float

    def __call__(self, views: Mapping[int, Tensor], before: Callable[[int], None]) -> dict[int, Shown]:
        """One forward pass for each view.

        BatchNorm statistics follow the mean of the views, as they do where each view is seen on another rank.

        Args:
            views: [N, channels, H, W] that each resident sees; the same tensor where views are shared.
            before: called with the first peer that sees a view, before that view's pass.
        """
        if not views:
            return {}
        statistics = floats([self.module])
        counters = [b for b in self.module.buffers() if not b.is_floating_point()]
        start, ends = flat(statistics) if statistics else None, []
        runs: dict[int, tuple[Tensor, dict[str, Tensor]]] = {}
        for index, images in views.items():
            if id(images) in runs:
                continue
            if start is not None:
                fill(statistics, start)
            before(index)
            runs[id(images)] = self.wrapped(images), self.taps.take()
            if start is not None:
                ends.append(flat(statistics))
        if ends:
            fill(statistics, torch.stack(ends).mean(0))
        for counter in counters:
            counter -= len(runs) - 1  # one step, however many views
        return {k: self._shown(*runs[id(images)]) for k, images in views.items()}

    def _shown(self, found: Tensor, taps: Mapping[str, Tensor]) -> Shown:
        return Shown(
            found,
            scale_gradient(found, self.gradient),
            {name: scale_gradient(x, self.gradient) for name, x in taps.items()},
        )


@dataclass(frozen=True)
class Shown:
    """What the trunk gives for one view."""

    plain: Tensor
    """Its map [N, channels, side, side], for modules that all peers share, and whose gradient is whole on any rank."""
    map: Tensor
    """The same for a peer's branch, and"""
    taps: dict[str, Tensor]
    """feature maps by name, for its head."""

"""A peer: its network with the head that the method attached, and what this rank keeps beside it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from engine.cohort.frozen import Reference
from engine.cohort.teacher import Teacher
from models.stages import Taps

if TYPE_CHECKING:
    from timm.utils import ModelEmaV3


class Peer(nn.Module):
    """A network, or its branch, and the head that the method attached to it."""

    def __init__(self, network: nn.Module, head: nn.Module | None, taps: Taps | None, signals: Sequence[str]) -> None:
        super().__init__()
        self.network = network
        self.head = head
        self._taps = taps
        self._signals = dict.fromkeys(("logits", *signals))

    def forward(self, images: Tensor, below: Mapping[str, Tensor] | None = None) -> dict[str, Tensor]:
        """Gives the peer's signals.

        Args:
            images: [N, channels, H, W]; for a branch the trunk's map.
            below: feature maps that the trunk has shown.

        Returns:
            `logits` [N, C], and what else the method asked for.
        """
        available = {**(below or {}), "logits": self.network(images)}
        if self._taps is not None:
            available |= self._taps.take()
        if self.head is not None:
            available |= self.head(available)
        return {name: available[name] for name in self._signals}

    def drop_maps(self) -> None:
        """Lets go of feature maps that a forward pass of the network alone, as in an evaluation, has left behind."""
        if self._taps is not None:
            self._taps.take()


@dataclass
class Resident:
    """One peer on this rank."""

    index: int
    name: str
    peer: Peer
    whole: nn.Module
    """The peer's network, with the trunk where that is shared: what is evaluated and exported."""
    wrapped: nn.Module
    """The peer as it is called in training: it averages gradients over its replica group, if that has several ranks."""
    optimizer: torch.optim.Optimizer | None
    """None of a frozen peer, of which nothing changes."""
    parameters: list[nn.Parameter]
    """Of the peer, in its order; to walk through its modules in every step would take longer than a small step."""
    classifier: frozenset[nn.Parameter]
    """Those of them that are the network's classifier."""
    unsynchronised: frozenset[str]
    """Names of those parameters of the peer that its replicas do not have in common."""
    outer: dict[str, nn.Parameter]
    """Those parameters of the peer that an outer step moves, by name, and"""
    outer_optimizer: torch.optim.Optimizer | None
    ema: ModelEmaV3 | Teacher | None
    """The peer's moving average; a method's teacher, where it has one."""
    reference: Reference | None
    """Where a frozen peer's weights come from, which are not saved."""

    @property
    def averaged(self) -> nn.Module | None:
        """The network of the moving average; a frozen peer is its own."""
        if self.ema is not None:
            return self.ema.module
        return self.whole if self.optimizer is None else None

    @property
    def moving(self) -> list[nn.Module]:
        """What holds statistics that follow the images."""
        if self.optimizer is None:
            return []
        return [self.peer] if self.ema is None else [self.peer, self.ema]

    def update_average(self, decay: float | None, step: int) -> None:
        """Moves the average, if there is one, after update number `step`; a teacher with the method's decay."""
        if isinstance(self.ema, Teacher):
            self.ema.update(self.whole, decay or 0.0)
        elif self.ema is not None:
            # timm counts updates from 1, and takes no number for no warm-up.
            self.ema.update(self.whole, step=step + 1 if self.ema.use_warmup else None)

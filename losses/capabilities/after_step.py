"""For a method that acts after the optimiser step: to mix or copy parameters, or move banks.

Had by: codistillation, dcl, lmcl, mcl.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar, Protocol

import torch
from torch import Tensor, nn

from losses.contract import Progress, Signals


class ExchangeAfterStep(Protocol):
    """The exchange after a step. Every rank must call it equally often."""

    def __call__(self, own: Mapping[int, Signals], *, wire: torch.dtype = torch.float32) -> Sequence[Signals]:
        """Takes named tensors of each resident, gives those of all K peers in float32, by one all-gather.

        Where peers are jobs of their own (`MeetsAsJobs`) they leave their tensors in a folder and take those of the
        others as they lie there: nobody waits, and a peer of which nothing new has come has no tensors, {}.

        Args:
            own: of any shapes. A resident's own tensors come back as they are, not rounded to the wire's format.
            wire: number format under way, whatever the one that signals travel in.
        """


@dataclass(frozen=True)
class AfterStep:
    """What a method may use after an optimiser step, wherever the peers are."""

    residents: Mapping[int, nn.Module]
    """The peers that live here, by index: network and head. Their parameters may be written in place."""
    exchange: ExchangeAfterStep
    average_buffers: Callable[[], None]
    """Makes the residents' BatchNorm statistics those of all rows, as they are where the run is evaluated or saved: one
    all-reduce in each replica group of several ranks. Every rank must call it equally often."""
    everywhere: Sequence[Sequence[Signals]]
    """For each micro-batch, the `all_NAME` of every peer that `AllRows.everywhere` asked for, without gradient."""
    skipped: Tensor
    """[1] on the device, 1 where no optimiser has moved because some rank met a non-finite number."""
    progress: Progress


class ActsAfterStep(ABC):
    """Acts after the optimiser step."""

    alike: ClassVar[bool] = False
    """Whether all peers must have the same network and options, as where their parameters meet one by one."""

    @abstractmethod
    def after_step(self, after: AfterStep) -> None:
        """Called after each optimiser step, also one that was skipped, before an outer step and moving averages."""

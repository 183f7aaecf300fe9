"""For a method that learns some of its parameters in an outer problem: meta-optimisation, with gradients of gradients.

Had by: lmcl.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from losses.contract import Progress, Signals


@dataclass(frozen=True)
class OuterStep:
    """What an outer step may use: the residents as functions of their parameters, wherever the other peers are."""

    parameters: Mapping[int, Mapping[str, Tensor]]
    """Of each resident, by name, after the optimiser step: `network....` and `head....`, those of `outer` included."""
    outer: Mapping[int, Sequence[str]]
    """The names of each resident's parameters that `OuterProblem.outer` chose."""
    show: Callable[[Mapping[int, Mapping[str, Tensor]]], Sequence[Signals]]
    """Parameters of the residents -> the signals of all K peers for the rows of the step, as in `Method.forward`. The
    gradient, and the gradient of the gradient, reaches the residents' parameters and travels to the other peers' ranks:
    of the sum of what all ranks differentiate. BatchNorm uses the batch's statistics and keeps none. Every rank must
    call it, and differentiate, equally often."""
    average: Callable[[Mapping[int, Sequence[Tensor]]], dict[int, list[Tensor]]]
    """The mean of the residents' tensors over all replicas, without gradient: one all-reduce. Of derivatives of what
    was multiplied by `weight`, it is the derivative of the mean over all rows."""
    weight: float
    """What objectives, means over this rank's rows, are multiplied by before they are differentiated: 1 where all ranks
    have as many rows."""
    lr: float
    """The residents' learning rate in this step."""
    momentum: float
    weight_decay: Mapping[int, Mapping[str, float]]
    """Of each resident's parameters, by name."""
    targets: Tensor
    progress: Progress


class OuterProblem(ABC):
    """Owns parameters that an outer step moves."""

    @classmethod
    @abstractmethod
    def has_outer_problem(cls, options: Any) -> bool:
        """Whether there is one with these options."""

    @abstractmethod
    def outer(self, head: nn.Module) -> Sequence[nn.Parameter]:
        """The parameters of a peer's head that the step leaves alone and that `outer_step` has gradients for. They have
        an optimiser of their own, with the settings and schedule of the peer's. () where there are none."""

    @abstractmethod
    def outer_step(self, outer: OuterStep) -> Mapping[int, Sequence[Tensor]] | None:
        """After the optimiser step and `after_step`: gradients for each resident's parameters `outer`, in order; they
        are averaged over the replicas. None where none is due, which only the progress may decide."""

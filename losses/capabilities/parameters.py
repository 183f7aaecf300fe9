"""For a method some of whose parameters are not treated like the rest: not synchronised, or with another weight decay.

Had by: ffl, lmcl.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any

from torch import nn


class Unsynchronised(ABC):
    """Leaves parameters of heads to each replica, as some published code does."""

    @abstractmethod
    def unsynchronised(self, head: nn.Module) -> Sequence[nn.Parameter]:
        """The parameters of a peer's head that replicas begin with differently and whose gradients they do not average.
        The numbers then depend on the placement, and the first replica's are saved. () where there are none."""


class OwnWeightDecay(ABC):
    """Has modules that all peers share with a weight decay of their own."""

    @classmethod
    @abstractmethod
    def weight_decay(cls, options: Any) -> float:
        """Weight decay of the modules that all peers share, in the place of `optimizer.weight_decay`."""

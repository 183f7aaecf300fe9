"""For a method some of whose parameters replicas keep to themselves, as some published code does.

Had by: lmcl.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence

from torch import nn


class Unsynchronised(ABC):
    """Leaves parameters of heads to each replica."""

    @abstractmethod
    def unsynchronised(self, head: nn.Module) -> Sequence[nn.Parameter]:
        """The parameters of a peer's head that replicas begin with differently and whose gradients they do not average.
        The numbers then depend on the placement, and the first replica's are saved. () where there are none."""

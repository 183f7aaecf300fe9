"""For a method whose peers have classifiers after earlier stages that its paper reports too.

Had by: lmcl.
"""

from __future__ import annotations

from abc import ABC, abstractmethod

from torch import nn


class EarlyExits(ABC):
    """Its peers' signal `exits` [N, S, C] holds the logits after each of their stages, which are scored too."""

    @abstractmethod
    def num_exits(self, head: nn.Module) -> int:
        """S, of the peer with this head."""

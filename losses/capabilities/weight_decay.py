"""For a method whose shared modules decay otherwise than the networks.

Had by: ffl.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Any


class OwnWeightDecay(ABC):
    """Has modules that all peers share with a weight decay of their own."""

    @classmethod
    @abstractmethod
    def weight_decay(cls, options: Any) -> float:
        """Weight decay of the modules that all peers share, in the place of `optimizer.weight_decay`."""

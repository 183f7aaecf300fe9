"""For a method whose heads look at feature maps within a network: early classifiers, fusions of maps.

Had by: dcm, ffl, lmcl.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any


class StageTaps(ABC):
    """Shows feature maps of stages to heads. Only networks that have stages will do."""

    @classmethod
    @abstractmethod
    def taps(cls, options: Any, num_stages: int) -> Sequence[int]:
        """The stages, 1 .. S, whose feature maps `stage1` ... are shown to a peer's head.

        Raises:
            ValueError: the network has not the stages that the method needs.
        """

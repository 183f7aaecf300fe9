"""For a method that looks, before each epoch, at images that no peer is trained on (`data.held_out`).

Had by: kdcl.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any

from torch import Tensor

from losses.contract import Signals


class HeldOutSurveys(ABC):
    """Takes something from all held-out images before each epoch but the first."""

    @classmethod
    @abstractmethod
    def held_out(cls, options: Any) -> bool:
        """Whether it does with these options."""

    @abstractmethod
    def survey(self, signals: Sequence[Signals], targets: Tensor) -> Tensor:
        """What the method takes from some of the held-out images: added up over all of them, each once.

        Args:
            signals: `logits` of all K peers, in evaluation mode and without gradient.
            targets: class indices [N].

        Returns:
            A number for each pair of peers, float64 [K, K].
        """

    @abstractmethod
    def begin_epoch(self, surveyed: Tensor) -> None:
        """Takes the mean of `survey` over the held-out images, the same bits on every rank, and keeps in buffers what
        it makes of it."""

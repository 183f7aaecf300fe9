"""For a method whose peers learn from moving averages of each other.

Had by: pcl.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Any


class Teachers(ABC):
    """Gives each peer a teacher: a moving average of its parameters, theta' <- phi theta' + (1 - phi) theta.

    The teacher is a copy of the peer's whole network, trunk included. It runs in training mode and without gradient on
    the images that the peer sees, so that its BatchNorm statistics are its own, and shows its logits as the signal
    `teacher` [N, C]. It is saved, evaluated and exported as the peer's average. Needs one turn.
    """

    @classmethod
    @abstractmethod
    def teacher_decay(cls, options: Any, step: int) -> float:
        """phi after update number `step`, from 0."""

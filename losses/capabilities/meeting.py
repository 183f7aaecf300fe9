"""For a method whose peers may be jobs of their own, which meet in a folder (`placement.kind: jobs`).

Had by: codistillation.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping, Sequence

from torch import Tensor

from losses.capabilities.after_step import ActsAfterStep
from losses.contract import Signals


class MeetsAsJobs(ActsAfterStep):
    """Lets peers be jobs of their own, which exchange nothing but what they show after a step (`exchange = "none"`) and
    must do with what has come."""

    @abstractmethod
    def shapes_shown(self) -> Sequence[Mapping[str, tuple[int, ...]]]:
        """The shapes, by name, of what each of the K peers shows the others in `after_step`.

        What another job has left is used only if it is of these shapes.
        """

    @abstractmethod
    def answers(self, peer: int, shown: Signals, images: Tensor) -> Tensor:
        """The logits [N, C] that a peer gives as it has shown itself, without gradient; nothing of the method changes.

        What another job has left is used only if these are numbers that one can learn from.

        Args:
            peer: its index.
            shown: of `shapes_shown`.
            images: [N, channels, H, W].
        """

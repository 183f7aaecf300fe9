"""For a method that computes something from the images themselves, by networks of its own (`PeerInfo.network`).

Had by: codistillation.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping

from torch import Tensor

from losses.contract import Progress, Signals


class LooksAtImages(ABC):
    """Makes further signals of the residents where they live."""

    @abstractmethod
    def look(self, images: Mapping[int, Tensor], progress: Progress) -> Mapping[int, Signals]:
        """Further signals of the residents, made here from the images that they see, without gradient.

        Those that `Method.private` names are not sent.

        Args:
            images: [N, channels, H, W] that each resident sees; the same tensor where views are shared.
            progress: of the run.
        """

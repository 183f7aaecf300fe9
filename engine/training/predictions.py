"""What each network named for each image of the validation split, kept while the split is scored."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor


@dataclass(frozen=True)
class Predictions:
    """Of N images by several networks, on the CPU, the same on every rank."""

    targets: Tensor
    """Class of each image, -1 where it cannot be read: int64 [N]."""
    named: Tensor
    """The class that each network takes for the most probable: int64 [networks, N]."""
    probability: Tensor
    """That it gives it: float32 [networks, N]."""

    def confusion(self, network: int, classes: int) -> Tensor:
        """How many images of class i were named j; those that cannot be read are of none. int64 [classes, classes]."""
        there = self.targets >= 0
        places = self.targets[there] * classes + self.named[network, there]
        return places.bincount(minlength=classes**2).view(classes, classes)


class Ledger:
    """Takes down the images that a rank sees.

    Args:
        networks: how many name a class for each image.
        images: of the whole split.
        device: of what is taken down.
    """

    def __init__(self, networks: int, images: int, device: torch.device) -> None:
        self._whole = torch.zeros(1 + networks, images, dtype=torch.int64, device=device)
        self._probability = torch.zeros(networks, images, device=device)

    def add(self, ids: Tensor, targets: Tensor, scores: Tensor) -> None:
        """Takes down n images that nobody else does.

        Args:
            ids: of the images in the split, int64 [n].
            targets: see `Predictions`, int64 [n].
            scores: logits, or logarithms of probabilities, [networks, n, classes].
        """
        best = scores.float().softmax(-1).gather(-1, scores.argmax(-1, keepdim=True))[..., 0]
        self._whole[:, ids] = torch.cat([targets[None], scores.argmax(-1)])
        self._probability[:, ids] = best

    def close(self) -> Predictions:
        """Brings together what all ranks have taken down, exactly: each number meets zeros. Every rank calls it."""
        dist.all_reduce(self._whole)
        dist.all_reduce(self._probability)
        targets, *named = self._whole.cpu()
        return Predictions(targets, torch.stack(named), self._probability.cpu())

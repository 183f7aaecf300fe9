"""The plain trainer's loop: PIL images through a DataLoader, an optimiser for each part, `.item()` in every step."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from launch.bench.plain.contrast import LR
from launch.bench.plain.objectives import Objective

MEAN, STD = (0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616)


class Images(Dataset[tuple[list[Tensor], int]]):
    """uint8 images [n, H, W, 3] in memory, padded, cropped, flipped and normalised one by one, as CIFAR's are."""

    def __init__(self, images: np.ndarray, labels: np.ndarray, views: int) -> None:
        from torchvision import transforms

        self._images, self._labels, self._views = images, labels, views
        self._transform = transforms.Compose(
            [
                transforms.RandomCrop(images.shape[1], padding=4),
                transforms.RandomHorizontalFlip(),
                transforms.ToTensor(),
                transforms.Normalize(MEAN, STD),
            ]
        )

    def __len__(self) -> int:
        return len(self._labels)

    def __getitem__(self, index: int) -> tuple[list[Tensor], int]:
        from PIL import Image

        image = Image.fromarray(self._images[index])
        return [self._transform(image) for _ in range(self._views)], int(self._labels[index])


def batches(images: np.ndarray, labels: np.ndarray, views: int, batch: int, workers: int) -> Iterator[Any]:
    """Epochs without end. Workers stay between epochs, so that starting them is not timed."""
    loader = DataLoader(
        Images(images, labels, views),
        batch,
        shuffle=True,
        drop_last=True,
        num_workers=workers,
        persistent_workers=workers > 0,
    )
    while True:
        yield from loader


class Average:
    """A running mean of a number."""

    def __init__(self) -> None:
        self.total, self.count = 0.0, 0

    def update(self, value: float) -> None:
        """Takes one in."""
        self.total, self.count = self.total + value, self.count + 1


class Trainer:
    """Steps of one method.

    Args:
        objective: its networks and losses.
        data: batches.
    """

    def __init__(self, objective: Objective, data: Iterator[Any]) -> None:
        self.objective, self._data, self._step = objective.train(), data, 0
        self._optimizers = [
            torch.optim.SGD(module.parameters(), lr=LR, momentum=0.9, weight_decay=5e-4, nesterov=True)
            for module in objective.groups()
        ]
        self._meters: dict[int, Average] = {}

    def step(self) -> None:
        """One."""
        images, targets = next(self._data)
        losses = self.objective.losses(images, targets, 0)
        for optimizer in self._optimizers:
            optimizer.zero_grad()
        for loss in losses:
            loss.backward()
        for optimizer in self._optimizers:
            optimizer.step()
        self.objective.after(images, targets, self._step)
        for k, loss in enumerate(losses):
            self._meters.setdefault(k, Average()).update(loss.item())
        self._step += 1

"""The networks of the plain trainer: those of `models`, wired up in the way of the published code."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import models
from models.features import pooled_features
from models.heads import auxiliary
from models.stages import Taps, cut, stages


class Shape(NamedTuple):
    """Of networks and images."""

    network: str
    classes: int
    size: int
    """Side of the images, in pixels."""


class WithExits(nn.Module):
    """A network with classifiers after some of its stages.

    Args:
        shape: of the network.
        after: the stages, counted from the last: 1 is the one before the last.
        design: of the classifiers, see `models.heads`.
    """

    def __init__(self, shape: Shape, after: Sequence[int], design: str) -> None:
        super().__init__()
        self.network = models.create(shape.network, shape.classes)
        found = stages(self.network, 3, shape.size)
        numbers = [len(found) - back for back in after]
        self.exits = nn.ModuleList(
            [auxiliary(shape.network, {}, shape.classes, 3, shape.size, j, design) for j in numbers]
        )
        classifier, self.width = pooled_features(self.network)
        taps = {f"stage{j}": found[j - 1].module for j in numbers}
        self._maps, self._taps = list(taps), Taps(self.network, taps, {"features": classifier})

    def forward(self, images: Tensor) -> tuple[list[Tensor], list[Tensor]]:
        """Logits [N, C] and pooled features [N, D] of each exit, the network's own last."""
        logits = self.network(images)
        seen = self._taps.take()
        shown = [exit_(seen[name]) for exit_, name in zip(self.exits, self._maps, strict=True)]
        return [*(s["logits"] for s in shown), logits], [*(s["features"] for s in shown), seen["features"]]


class Branches(nn.Module):
    """One network with several last stages and classifiers."""

    def __init__(self, shape: Shape, number: int) -> None:
        super().__init__()
        wholes = [models.create(shape.network, shape.classes) for _ in range(number)]
        *_, before, last = stages(wholes[0], 3, shape.size)
        self.channels, self.last_channels = before.channels, last.channels
        classifier, self.width = pooled_features(wholes[0])
        parts = [cut(whole, before.module) for whole in wholes]
        self.trunk = parts[0][0]
        self.branches = nn.ModuleList([branch for _, branch in parts])
        self._taps = [Taps(branch, {"map": last.module}, {"features": classifier}) for branch in self.branches]

    def split(self, maps: Sequence[Tensor]) -> tuple[list[Tensor], list[Tensor], list[Tensor]]:
        """The trunk's map for each branch -> logits, pooled features and last maps of all branches."""
        logits = [branch(x) for branch, x in zip(self.branches, maps, strict=True)]
        seen = [taps.take() for taps in self._taps]
        return logits, [s["features"] for s in seen], [s["map"] for s in seen]


class Gate(nn.Module):
    """ONE's: the trunk's map [N, c, h, w] -> weights of the branches [N, K]."""

    def __init__(self, channels: int, number: int) -> None:
        super().__init__()
        self.linear, self.norm = nn.Linear(channels, number), nn.BatchNorm1d(number)

    def forward(self, x: Tensor) -> Tensor:
        pooled = F.avg_pool2d(x, x.shape[2]).view(x.shape[0], -1)
        return F.softmax(F.relu(self.norm(self.linear(pooled))), dim=1)


class Fusion(nn.Module):
    """FFL's: the last maps of all branches -> logits [N, C]."""

    def __init__(self, channels: int, number: int, classes: int) -> None:
        super().__init__()
        wide = channels * number
        self.depthwise = nn.Conv2d(wide, wide, 3, padding=1, groups=wide, bias=False)
        self.norm1 = nn.BatchNorm2d(wide)
        self.pointwise = nn.Conv2d(wide, channels, 1, bias=False)
        self.norm2 = nn.BatchNorm2d(channels)
        self.fc = nn.Linear(channels, classes)

    def forward(self, maps: Sequence[Tensor]) -> Tensor:
        x = F.relu(self.norm1(self.depthwise(torch.cat(list(maps), 1))))
        x = F.relu(self.norm2(self.pointwise(x)))
        return self.fc(F.avg_pool2d(x, x.shape[2]).flatten(1))


class Embedding(nn.Module):
    """MCL's: pooled features [N, D] -> rows of unit length [N, 128]."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.fc1, self.fc2 = nn.Linear(width, 128), nn.Linear(128, 128)

    def forward(self, features: Tensor) -> Tensor:
        x = self.fc2(F.relu(self.fc1(features)))
        return x / x.norm(dim=1, keepdim=True)

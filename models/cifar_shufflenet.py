"""ShuffleNetV2 for 32x32 images: the first convolution has stride 1, and there is no max pooling.

Source: Ma et al., "ShuffleNet V2" (ECCV 2018), in the form of MCL and L-MCL. With 3 channels and 100 classes:

| name                     | parameters | multiply-adds |
| ------------------------ | ---------- | ------------- |
| cifar_shufflenetv2_x0_5  | 444,292    | 10.99 M       |
| cifar_shufflenetv2_x1_0  | 1,356,104  | 45.09 M       |
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from models.layers import Straight, shuffle
from models.registry import register

_WIDTHS = {"0_5": (48, 96, 192), "1_0": (116, 232, 464)}


def _pointwise(inputs: int, outputs: int) -> list[nn.Module]:
    return [nn.Conv2d(inputs, outputs, 1, bias=False), nn.BatchNorm2d(outputs), nn.ReLU()]


def _depthwise(channels: int, stride: int) -> list[nn.Module]:
    return [
        nn.Conv2d(channels, channels, 3, stride, padding=1, groups=channels, bias=False),
        nn.BatchNorm2d(channels),
    ]


class DownUnit(nn.Module):
    """[n, inputs, h, w] to [n, outputs, h / 2, w / 2]: two branches side by side, shuffled."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        half = outputs // 2
        self.left = nn.Sequential(*_depthwise(inputs, 2), *_pointwise(inputs, half))
        self.right = nn.Sequential(*_pointwise(inputs, half), *_depthwise(half, 2), *_pointwise(half, half))

    def forward(self, x: Tensor) -> Tensor:
        return shuffle(torch.cat([self.left(x), self.right(x)], dim=1), 2)


class BasicUnit(nn.Module):
    """[n, channels, h, w] stays so: the first half of the channels as it is, the second through a branch, shuffled."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        half = channels // 2
        self.right = nn.Sequential(*_pointwise(half, half), *_depthwise(half, 1), *_pointwise(half, half))

    def forward(self, x: Tensor) -> Tensor:
        left, right = x.chunk(2, dim=1)
        return shuffle(torch.cat([left, self.right(right)], dim=1), 2)


class CifarShuffleNetV2(Straight):
    """The network: [n, in_channels, h, w] to logits [n, num_classes].

    For 32x32 images the stages give [n, c1, 16, 16], [n, c2, 8, 8] and [n, c3, 4, 4], c of `widths`; the pooled
    feature, the input of `fc`, is [n, 1024]. Any h and w will do. Initialisation: PyTorch's.
    """

    stages = ("stage1", "stage2", "stage3")

    def __init__(self, widths: tuple[int, int, int], num_classes: int, in_channels: int) -> None:
        super().__init__(num_classes)
        self.conv1 = nn.Conv2d(in_channels, 24, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(24)
        self.relu1 = nn.ReLU()
        self.stage1 = _stage(24, widths[0], 3)
        self.stage2 = _stage(widths[0], widths[1], 7)
        self.stage3 = _stage(widths[1], widths[2], 3)
        self.conv2 = nn.Conv2d(widths[2], 1024, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(1024)
        self.relu2 = nn.ReLU()
        self.avgpool = nn.AdaptiveAvgPool2d(1)
        self.flatten = nn.Flatten()
        self.fc = nn.Linear(1024, num_classes)


def _stage(inputs: int, outputs: int, units: int) -> nn.Sequential:
    return nn.Sequential(DownUnit(inputs, outputs), *(BasicUnit(outputs) for _ in range(units)))


@register(
    r"cifar_shufflenetv2_x(?P<multiplier>0_5|1_0)",
    examples=["cifar_shufflenetv2_x0_5", "cifar_shufflenetv2_x1_0"],
    family="ShuffleNetV2",
    source="Ma et al. 2018; MCL, L-MCL",
)
def cifar_shufflenetv2(multiplier: str, num_classes: int, in_channels: int = 3) -> CifarShuffleNetV2:
    """Build a ShuffleNetV2.

    Args:
        multiplier: of the width, "0_5" or "1_0".
        num_classes: outputs.
        in_channels: channels of the images.
    """
    return CifarShuffleNetV2(_WIDTHS[multiplier], num_classes, in_channels)

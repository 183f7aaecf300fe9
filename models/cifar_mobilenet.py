"""MobileNet for 32x32 images: depthwise-separable blocks in three stages.

Source: Howard et al., "MobileNets" (2017), in the form of DCM, which is also DML's by its 3.3 M parameters. With
3 channels and 100 classes it has 3,309,476 parameters and 0.612 G multiply-adds.
"""

from __future__ import annotations

from itertools import pairwise

from torch import nn

from models.layers import Straight
from models.registry import register


def separable(inputs: int, outputs: int, stride: int) -> nn.Sequential:
    """Depthwise 3x3 with the stride, and pointwise 1x1, each with batch norm and ReLU."""
    return nn.Sequential(
        nn.Conv2d(inputs, inputs, 3, stride, padding=1, groups=inputs, bias=False),
        nn.BatchNorm2d(inputs),
        nn.ReLU(),
        nn.Conv2d(inputs, outputs, 1, bias=False),
        nn.BatchNorm2d(outputs),
        nn.ReLU(),
    )


def separables(inputs: int, outputs: tuple[int, ...], stride: int) -> nn.Sequential:
    """Blocks with these output channels; the first has the stride."""
    widths = pairwise((inputs, *outputs))
    return nn.Sequential(*(separable(a, b, 1 if i else stride) for i, (a, b) in enumerate(widths)))


class CifarMobileNet(Straight):
    """The network: [n, in_channels, h, w] to logits [n, num_classes].

    For 32x32 images the stages give [n, 256, 32, 32], [n, 512, 16, 16] and [n, 1024, 8, 8]; the pooled feature, the
    input of `fc`, is [n, 1024]. Any h and w will do. Initialisation: PyTorch's.
    """

    stages = ("layer1", "layer2", "layer3")

    def __init__(self, num_classes: int, in_channels: int) -> None:
        super().__init__(num_classes)
        self.conv1 = nn.Conv2d(in_channels, 32, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(32)
        self.relu = nn.ReLU()
        self.layer1 = separables(32, (64, 128, 128, 256, 256), 1)
        self.layer2 = separables(256, (512,) * 6, 2)
        self.layer3 = separables(512, (1024, 1024), 2)
        self.avgpool = nn.AdaptiveAvgPool2d(1)
        self.flatten = nn.Flatten()
        self.fc = nn.Linear(1024, num_classes)


@register(r"cifar_mobilenet", examples=["cifar_mobilenet"], family="MobileNet", source="Howard et al. 2017; DCM, DML")
def cifar_mobilenet(num_classes: int, in_channels: int = 3) -> CifarMobileNet:
    """Build MobileNet.

    Args:
        num_classes: outputs.
        in_channels: channels of the images.
    """
    return CifarMobileNet(num_classes, in_channels)

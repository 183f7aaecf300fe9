"""CIFAR ResNets: three stages of basic blocks, depth 6n+2.

Source: He et al., "Deep Residual Learning for Image Recognition" (CVPR 2016), section 4.2. Shortcut A is the paper's,
as Deep Mutual Learning's ResNet-32 has it; shortcut B is the one of PCL, FFL and MCL (ResNet-32, ResNet-56).

Parameters and multiply-adds (convolutions and the classifier, one 32x32 image) with 3 channels and 100 classes:

| name                | parameters | multiply-adds |
| ------------------- | ---------- | ------------- |
| cifar_resnet32_a    | 470,004    | 68.9 M        |
| cifar_resnet32_b    | 472,756    | 69.13 M       |
| cifar_resnet56_b    | 861,620    | 125.75 M      |
| cifar_resnet110_b   | 1,736,564  | 253.16 M      |

The literature has a bottleneck network of 1,170,868 parameters under the name ResNet-110 too; here it is basic blocks.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from models.errors import blocks_per_stage
from models.registry import register


class Subsample(nn.Module):
    """Shortcut A: every second pixel, and zero channels appended. No parameters.

    [n, in_channels, h, w] to [n, out_channels, ceil(h / stride), ceil(w / stride)].
    """

    def __init__(self, in_channels: int, out_channels: int, stride: int) -> None:
        super().__init__()
        self.new_channels = out_channels - in_channels
        self.stride = stride

    def forward(self, x: Tensor) -> Tensor:
        return F.pad(x[:, :, :: self.stride, :: self.stride], (0, 0, 0, 0, 0, self.new_channels))


def projection(in_channels: int, out_channels: int, stride: int) -> nn.Module:
    """Shortcut B: 1x1 convolution and batch norm, with the shapes of `Subsample`."""
    return nn.Sequential(
        nn.Conv2d(in_channels, out_channels, 1, stride, bias=False),
        nn.BatchNorm2d(out_channels),
    )


_SHORTCUTS: dict[str, Callable[[int, int, int], nn.Module]] = {"a": Subsample, "b": projection}


class BasicBlock(nn.Module):
    """relu(bn(conv3x3(relu(bn(conv3x3(x))))) + shortcut(x)): [n, in, h, w] to [n, out, h / stride, w / stride]."""

    def __init__(self, in_channels: int, out_channels: int, stride: int, shortcut: str) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(in_channels, out_channels, 3, stride, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(out_channels)
        self.conv2 = nn.Conv2d(out_channels, out_channels, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(out_channels)
        self.shortcut: nn.Module = nn.Identity()
        if stride != 1 or in_channels != out_channels:
            self.shortcut = _SHORTCUTS[shortcut](in_channels, out_channels, stride)

    def forward(self, x: Tensor) -> Tensor:
        out = F.relu(self.bn1(self.conv1(x)))
        out = self.bn2(self.conv2(out))
        return F.relu(out + self.shortcut(x))


class CifarResNet(nn.Module):
    """The network: [n, in_channels, h, w] to logits [n, num_classes].

    For 32x32 images the stages give [n, width, 32, 32], [n, 2 width, 16, 16] and [n, 4 width, 8, 8]; their pooled
    feature, the input of `fc`, is [n, 4 width]. Any h and w will do, since the pooling is global.

    Initialisation (MCL's): convolutions normal with std sqrt(2 / fan_out), batch norm 1 and 0, linear PyTorch's.
    """

    def __init__(self, blocks: int, shortcut: str, num_classes: int, in_channels: int, width: int) -> None:
        super().__init__()
        self.num_classes = num_classes
        self.conv1 = nn.Conv2d(in_channels, width, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.layer1 = _stage(width, width, 1, blocks, shortcut)
        self.layer2 = _stage(width, 2 * width, 2, blocks, shortcut)
        self.layer3 = _stage(2 * width, 4 * width, 2, blocks, shortcut)
        self.fc = nn.Linear(4 * width, num_classes)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.bn1(self.conv1(x)))
        x = self.layer3(self.layer2(self.layer1(x)))
        return self.fc(torch.flatten(F.adaptive_avg_pool2d(x, 1), 1))


def _stage(in_channels: int, out_channels: int, stride: int, blocks: int, shortcut: str) -> nn.Sequential:
    first = BasicBlock(in_channels, out_channels, stride, shortcut)
    rest = (BasicBlock(out_channels, out_channels, 1, shortcut) for _ in range(blocks - 1))
    return nn.Sequential(first, *rest)


@register(
    r"cifar_resnet(?P<depth>[1-9]\d*)_(?P<shortcut>[ab])",
    examples=[f"cifar_resnet{depth}_{shortcut}" for depth in (8, 14, 20, 32, 44, 56, 110) for shortcut in "ab"],
)
def cifar_resnet(depth: int, shortcut: str, num_classes: int, in_channels: int = 3, *, width: int = 16) -> CifarResNet:
    """Build a CIFAR ResNet.

    Args:
        depth: 6n+2 weighted layers on the main path.
        shortcut: where the shape changes, "a" for stride-2 subsampling with zero channels appended, "b" for 1x1
            convolution and batch norm.
        num_classes: outputs.
        in_channels: channels of the images.
        width: channels of the first stage.

    Raises:
        UnknownNetwork: the depth is not 6n+2.
        ValueError: the width is not a positive integer.
    """
    if not isinstance(width, int) or width < 1:
        raise ValueError(f"option 'width' is {width!r}; expected a positive integer")
    return CifarResNet(blocks_per_stage(depth, 2), shortcut, num_classes, in_channels, width)

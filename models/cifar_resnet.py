"""CIFAR ResNets: three stages of residual blocks, with basic blocks (depth 6n+2) or bottlenecks (depth 9n+2).

Source: He et al., "Deep Residual Learning for Image Recognition" (CVPR 2016), section 4.2. Shortcut A is the paper's,
as Deep Mutual Learning's ResNet-32 has it; shortcut B is the one of PCL, FFL and MCL (ResNet-32, ResNet-56), and of all
bottleneck networks here. Batch norm and ReLU come after the convolution and the ReLU after the addition.

Parameters and multiply-adds (convolutions and the classifier, one 32x32 image) with 3 channels and 100 classes:

| name                         | parameters | multiply-adds |
| ---------------------------- | ---------- | ------------- |
| cifar_resnet32_a             | 470,004    | 68.9 M        |
| cifar_resnet32_b             | 472,756    | 69.13 M       |
| cifar_resnet56_b             | 861,620    | 125.75 M      |
| cifar_resnet110_b            | 1,736,564  | 253.16 M      |
| cifar_resnet110_bottleneck   | 1,170,868  | 167.45 M      |
| cifar_resnet164_bottleneck   | 1,727,284  | 247.67 M      |

"ResNet-110" is three networks in the literature. Which one a paper's code means:

| name here                  | blocks per stage | who calls it ResNet-110                        |
| -------------------------- | ---------------- | ---------------------------------------------- |
| cifar_resnet110_b          | 18 basic         | FFL, KDCL                                      |
| cifar_resnet110_bottleneck | 12 bottlenecks   | PCL, OKDDip, MCL, L-MCL                        |
| cifar_resnet164_bottleneck | 18 bottlenecks   | ONE (164 weighted layers on its main path)     |

DCM's paper has a ResNet-164 too. Its code is not public and its block (before or after the activation) is not known
here, so that `cifar_resnet164_bottleneck` is its depth and its size, and maybe not its order of layers.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

from torch import Tensor, nn
from torch.nn import functional as F

from models.errors import blocks_per_stage
from models.layers import Straight, kaiming_convolutions, positive, stage
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


class Bottleneck(nn.Module):
    """1x1, 3x3 with the stride and 1x1 convolution, the first two to `inner_ratio` out channels; shortcut B.

    relu(bn(conv1x1(relu(bn(conv3x3(relu(bn(conv1x1(x)))))))) + shortcut(x)): [n, in, h, w] to
    [n, out, h / stride, w / stride].
    """

    def __init__(self, in_channels: int, out_channels: int, stride: int, inner_ratio: float = 0.25) -> None:
        super().__init__()
        inner = int(out_channels * inner_ratio)
        self.conv1 = nn.Conv2d(in_channels, inner, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(inner)
        self.conv2 = nn.Conv2d(inner, inner, 3, stride, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(inner)
        self.conv3 = nn.Conv2d(inner, out_channels, 1, bias=False)
        self.bn3 = nn.BatchNorm2d(out_channels)
        self.shortcut: nn.Module = nn.Identity()
        if stride != 1 or in_channels != out_channels:
            self.shortcut = projection(in_channels, out_channels, stride)

    def forward(self, x: Tensor) -> Tensor:
        out = F.relu(self.bn1(self.conv1(x)))
        out = F.relu(self.bn2(self.conv2(out)))
        out = self.bn3(self.conv3(out))
        return F.relu(out + self.shortcut(x))


class CifarResNet(Straight):
    """The network: [n, in_channels, h, w] to logits [n, num_classes].

    For 32x32 images the stages give [n, d, 32, 32], [n, 2 d, 16, 16] and [n, 4 d, 8, 8], d = width expansion; their
    pooled feature, the input of `fc`, is [n, 4 d]. Any h and w will do, since the pooling is global.

    Initialisation (MCL's): convolutions normal with std sqrt(2 / fan_out), batch norm 1 and 0, linear PyTorch's.

    Args:
        block: makes a block of (channels in, channels out, stride).
        blocks: blocks in each stage.
        width: channels of the first convolution.
        expansion: channels of the first stage, over `width`.
        num_classes: outputs.
        in_channels: channels of the images.
    """

    stages = ("layer1", "layer2", "layer3")

    def __init__(
        self,
        block: Callable[[int, int, int], nn.Module],
        blocks: int,
        width: int,
        expansion: int,
        num_classes: int,
        in_channels: int,
    ) -> None:
        super().__init__(num_classes)
        out = width * expansion
        self.conv1 = nn.Conv2d(in_channels, width, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.relu = nn.ReLU()
        self.layer1 = stage(block, width, out, 1, blocks)
        self.layer2 = stage(block, out, 2 * out, 2, blocks)
        self.layer3 = stage(block, 2 * out, 4 * out, 2, blocks)
        self.avgpool = nn.AdaptiveAvgPool2d(1)
        self.flatten = nn.Flatten()
        self.fc = nn.Linear(4 * out, num_classes)
        kaiming_convolutions(self)


@register(
    r"cifar_resnet(?P<depth>[1-9]\d*)_(?P<shortcut>[ab])",
    examples=[f"cifar_resnet{depth}_{shortcut}" for depth in (8, 14, 20, 32, 44, 56, 110) for shortcut in "ab"],
    family="CIFAR ResNet",
    source="He et al. 2016a; a: DML, b: PCL, KDCL, ONE, FFL, MCL",
)
def cifar_resnet(depth: int, shortcut: str, num_classes: int, in_channels: int = 3, *, width: int = 16) -> CifarResNet:
    """Build a CIFAR ResNet of basic blocks.

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
    block = partial(BasicBlock, shortcut=shortcut)
    return CifarResNet(block, blocks_per_stage(depth, 2), positive("width", width), 1, num_classes, in_channels)


@register(
    r"cifar_resnet(?P<depth>[1-9]\d*)_bottleneck",
    examples=["cifar_resnet110_bottleneck", "cifar_resnet164_bottleneck"],
    family="CIFAR ResNet",
    source="110: PCL, OKDDip, MCL, L-MCL; 164: ONE's ResNet-110",
)
def cifar_resnet_bottleneck(depth: int, num_classes: int, in_channels: int = 3, *, width: int = 16) -> CifarResNet:
    """Build a CIFAR ResNet of bottlenecks, whose stages have 4, 8 and 16 times `width` channels.

    Args:
        depth: 9n+2 weighted layers on the main path.
        num_classes: outputs.
        in_channels: channels of the images.
        width: channels of the first convolution.

    Raises:
        UnknownNetwork: the depth is not 9n+2.
        ValueError: the width is not a positive integer.
    """
    n = blocks_per_stage(depth, 2, 9)
    return CifarResNet(Bottleneck, n, positive("width", width), 4, num_classes, in_channels)

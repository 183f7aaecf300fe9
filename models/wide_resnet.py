"""Wide ResNets for small images: three stages of pre-activation basic blocks, depth 6n+4, k times as wide.

Source: Zagoruyko & Komodakis, "Wide Residual Networks" (BMVC 2016), in the form of DCM and MCL: no convolution has a
bias, the stride is on a block's first convolution, and where channels change the 1x1 shortcut takes the activated
input. (Other code puts the stride on the second convolution or the shortcut on the raw input: other numbers.)

Two more go by that name in the literature and are other networks:

- `cifar_wrn_16_4_dcl` is Deep Communication Learning's: every convolution has a bias, and the shortcut takes the raw
  input.
- `cifar_wrn_20_8_bottleneck` is the "WRN-20-8" of PCL and OKDDip: a CIFAR ResNet of 9n+2 layers in bottlenecks, with
  the activation after the addition, that are k times as wide inside and as wide as ever outside.

Parameters and multiply-adds (convolutions and the classifier, one 32x32 image) with 3 channels and 100 classes:

| name                      | parameters | multiply-adds |
| ------------------------- | ---------- | ------------- |
| cifar_wrn_16_2            | 703,284    | 101.12 M      |
| cifar_wrn_28_2            | 1,479,220  | 214.36 M      |
| cifar_wrn_40_2            | 2,255,156  | 327.61 M      |
| cifar_wrn_28_4            | 5,872,180  | 845.62 M      |
| cifar_wrn_28_10           | 36,536,884 | 5.243 G       |
| cifar_wrn_16_4_dcl        | 2,774,276  | 392.64 M      |
| cifar_wrn_20_8_bottleneck | 6,871,220  | 1.023 G       |
"""

from __future__ import annotations

from functools import partial

from torch import Tensor, nn
from torch.nn import functional as F

from models.cifar_resnet import Bottleneck, CifarResNet
from models.errors import blocks_per_stage
from models.layers import Straight, kaiming_convolutions, probability, stage
from models.registry import register


class PreActBlock(nn.Module):
    """conv3x3(dropout(relu(bn(conv3x3(o))))) + shortcut with o = relu(bn(x)).

    [n, in, h, w] to [n, out, h / stride, w / stride]. The shortcut is x, or where in != out a 1x1 convolution of o. In
    DCL's form it is one of x, and the convolutions have biases.
    """

    def __init__(self, in_channels: int, out_channels: int, stride: int, dropout: float, dcl: bool = False) -> None:
        super().__init__()
        self.of_raw = dcl
        self.bn1 = nn.BatchNorm2d(in_channels)
        self.conv1 = nn.Conv2d(in_channels, out_channels, 3, stride, padding=1, bias=dcl)
        self.bn2 = nn.BatchNorm2d(out_channels)
        self.dropout = nn.Dropout(dropout)
        self.conv2 = nn.Conv2d(out_channels, out_channels, 3, padding=1, bias=dcl)
        self.shortcut: nn.Conv2d | None = None
        if in_channels != out_channels:
            self.shortcut = nn.Conv2d(in_channels, out_channels, 1, stride, bias=dcl)

    def forward(self, x: Tensor) -> Tensor:
        o1 = F.relu(self.bn1(x))
        out = self.dropout(F.relu(self.bn2(self.conv1(o1))))
        if self.shortcut is not None:
            x = self.shortcut(x if self.of_raw else o1)
        return self.conv2(out) + x


class WideResNet(Straight):
    """The network: [n, in_channels, h, w] to logits [n, num_classes].

    For 32x32 images the stages give, before any activation, [n, 16k, 32, 32], [n, 32k, 16, 16] and [n, 64k, 8, 8];
    the pooled feature, the input of `fc`, is [n, 64k]. Any h and w will do, since the pooling is global.

    Initialisation: MCL's, that is convolutions normal with std sqrt(2 / (k k out_channels)), which is fan_out,
    batch norm 1 and 0, linear bias 0 and weight PyTorch's. DCM draws from fan_in, and batch norm weights from U(0, 1);
    we do not, so that one initialisation serves all methods. DCL's form starts as PyTorch has it.
    """

    stages = ("layer1", "layer2", "layer3")

    def __init__(
        self, blocks: int, k: int, num_classes: int, in_channels: int, dropout: float, dcl: bool = False
    ) -> None:
        super().__init__(num_classes)
        block = partial(PreActBlock, dropout=dropout, dcl=dcl)
        self.conv1 = nn.Conv2d(in_channels, 16, 3, padding=1, bias=dcl)
        self.layer1 = stage(block, 16, 16 * k, 1, blocks)
        self.layer2 = stage(block, 16 * k, 32 * k, 2, blocks)
        self.layer3 = stage(block, 32 * k, 64 * k, 2, blocks)
        self.bn = nn.BatchNorm2d(64 * k)
        self.relu = nn.ReLU()
        self.avgpool = nn.AdaptiveAvgPool2d(1)
        self.flatten = nn.Flatten()
        self.fc = nn.Linear(64 * k, num_classes)
        if not dcl:
            kaiming_convolutions(self)
            nn.init.zeros_(self.fc.bias)


@register(
    r"cifar_wrn_(?P<depth>[1-9]\d*)_(?P<k>[1-9]\d*)",
    examples=[f"cifar_wrn_{shape}" for shape in ("16_1", "16_2", "16_4", "28_2", "28_4", "28_10", "40_1", "40_2")],
    family="Wide ResNet",
    source="Zagoruyko & Komodakis 2016; DML, DCM, MCL, L-MCL",
)
def cifar_wrn(depth: int, k: int, num_classes: int, in_channels: int = 3, *, dropout: float = 0.0) -> WideResNet:
    """Build a Wide ResNet.

    Args:
        depth: 6n+4 convolutions: 6n in blocks, the stem, and the three 1x1 shortcuts.
        k: widening factor; the stages have 16k, 32k and 64k channels.
        num_classes: outputs.
        in_channels: channels of the images.
        dropout: probability, between the two convolutions of a block.

    Raises:
        UnknownNetwork: the depth is not 6n+4.
        ValueError: the dropout is no number in [0, 1).
    """
    return WideResNet(blocks_per_stage(depth, 4), k, num_classes, in_channels, probability("dropout", dropout))


@register(
    r"cifar_wrn_(?P<depth>[1-9]\d*)_(?P<k>[1-9]\d*)_dcl",
    examples=["cifar_wrn_16_4_dcl"],
    family="Wide ResNet",
    source="DCL",
)
def cifar_wrn_dcl(depth: int, k: int, num_classes: int, in_channels: int = 3) -> WideResNet:
    """Build a Wide ResNet in DCL's form; the arguments and the errors are those of `cifar_wrn`."""
    return WideResNet(blocks_per_stage(depth, 4), k, num_classes, in_channels, dropout=0.0, dcl=True)


@register(
    r"cifar_wrn_(?P<depth>[1-9]\d*)_(?P<k>[1-9]\d*)_bottleneck",
    examples=["cifar_wrn_20_8_bottleneck"],
    family="Wide ResNet",
    source="PCL's and OKDDip's WRN-20-8",
)
def cifar_wrn_bottleneck(depth: int, k: int, num_classes: int, in_channels: int = 3) -> CifarResNet:
    """Build a CIFAR ResNet of bottlenecks with k times the channels inside.

    Args:
        depth: 9n+2 weighted layers on the main path.
        k: widening factor; inside, the stages have 16k, 32k and 64k channels, and outside 64, 128 and 256.
        num_classes: outputs.
        in_channels: channels of the images.

    Raises:
        UnknownNetwork: the depth is not 9n+2.
    """
    block = partial(Bottleneck, inner_ratio=k / 4)
    return CifarResNet(block, blocks_per_stage(depth, 2, 9), 16, 4, num_classes, in_channels)

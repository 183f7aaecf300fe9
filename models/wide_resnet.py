"""Wide ResNets for small images: three stages of pre-activation basic blocks, depth 6n+4, k times as wide.

Source: Zagoruyko & Komodakis, "Wide Residual Networks" (BMVC 2016), in the form of DCM and MCL: no convolution has a
bias, the stride is on a block's first convolution, and where channels change the 1x1 shortcut takes the activated
input. (Other code puts the stride on the second convolution or the shortcut on the raw input: other numbers.)

Parameters and multiply-adds (convolutions and the classifier, one 32x32 image) with 3 channels and 100 classes:

| name            | parameters | multiply-adds |
| --------------- | ---------- | ------------- |
| cifar_wrn_16_2  | 703,284    | 101.12 M      |
| cifar_wrn_28_2  | 1,479,220  | 214.36 M      |
| cifar_wrn_40_2  | 2,255,156  | 327.61 M      |
| cifar_wrn_28_4  | 5,872,180  | 845.62 M      |
| cifar_wrn_28_10 | 36,536,884 | 5.243 G       |
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from models.errors import blocks_per_stage
from models.registry import register


class PreActBlock(nn.Module):
    """conv3x3(dropout(relu(bn(conv3x3(o))))) + shortcut with o = relu(bn(x)).

    [n, in, h, w] to [n, out, h / stride, w / stride]. The shortcut is x, or a 1x1 convolution of o where in != out.
    """

    def __init__(self, in_channels: int, out_channels: int, stride: int, dropout: float) -> None:
        super().__init__()
        self.bn1 = nn.BatchNorm2d(in_channels)
        self.conv1 = nn.Conv2d(in_channels, out_channels, 3, stride, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(out_channels)
        self.dropout = nn.Dropout(dropout)
        self.conv2 = nn.Conv2d(out_channels, out_channels, 3, padding=1, bias=False)
        self.shortcut: nn.Conv2d | None = None
        if in_channels != out_channels:
            self.shortcut = nn.Conv2d(in_channels, out_channels, 1, stride, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        o1 = F.relu(self.bn1(x))
        out = self.dropout(F.relu(self.bn2(self.conv1(o1))))
        return self.conv2(out) + (x if self.shortcut is None else self.shortcut(o1))


class WideResNet(nn.Module):
    """The network: [n, in_channels, h, w] to logits [n, num_classes].

    For 32x32 images the stages give, before any activation, [n, 16k, 32, 32], [n, 32k, 16, 16] and [n, 64k, 8, 8];
    the pooled feature, the input of `fc`, is [n, 64k]. Any h and w will do, since the pooling is global.

    Initialisation: MCL's, that is convolutions normal with std sqrt(2 / (k k out_channels)), which is fan_out,
    batch norm 1 and 0, linear bias 0 and weight PyTorch's. DCM draws from fan_in, and batch norm weights from U(0, 1);
    we do not, so that one initialisation serves all methods.
    """

    def __init__(self, blocks: int, k: int, num_classes: int, in_channels: int, dropout: float) -> None:
        super().__init__()
        self.num_classes = num_classes
        self.conv1 = nn.Conv2d(in_channels, 16, 3, padding=1, bias=False)
        self.layer1 = _stage(16, 16 * k, 1, blocks, dropout)
        self.layer2 = _stage(16 * k, 32 * k, 2, blocks, dropout)
        self.layer3 = _stage(32 * k, 64 * k, 2, blocks, dropout)
        self.bn = nn.BatchNorm2d(64 * k)
        self.fc = nn.Linear(64 * k, num_classes)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
        nn.init.zeros_(self.fc.bias)

    def forward(self, x: Tensor) -> Tensor:
        x = self.layer3(self.layer2(self.layer1(self.conv1(x))))
        x = F.relu(self.bn(x))
        return self.fc(torch.flatten(F.adaptive_avg_pool2d(x, 1), 1))


def _stage(in_channels: int, out_channels: int, stride: int, blocks: int, dropout: float) -> nn.Sequential:
    first = PreActBlock(in_channels, out_channels, stride, dropout)
    rest = (PreActBlock(out_channels, out_channels, 1, dropout) for _ in range(blocks - 1))
    return nn.Sequential(first, *rest)


@register(
    r"cifar_wrn_(?P<depth>[1-9]\d*)_(?P<k>[1-9]\d*)",
    examples=[f"cifar_wrn_{shape}" for shape in ("16_1", "16_2", "16_4", "28_2", "28_4", "28_10", "40_1", "40_2")],
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
    if not isinstance(dropout, (int, float)) or not 0 <= dropout < 1:
        raise ValueError(f"option 'dropout' is {dropout!r}; expected a number from 0 up to, not including, 1")
    return WideResNet(blocks_per_stage(depth, 4), k, num_classes, in_channels, dropout)

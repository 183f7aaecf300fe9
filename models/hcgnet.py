"""HCGNet for 32x32 images: dense blocks whose layers weigh two scales by attention and forget by a gate.

Source: Yang et al., "Gated Convolutional Networks with Hybrid Connectivity" (AAAI 2020), in the form of MCL and L-MCL.
With 3 channels and 100 classes:

| name            | parameters | multiply-adds | with the authors' counter |
| --------------- | ---------- | ------------- | ------------------------- |
| cifar_hcgnet_a1 | 1,102,651  | 154.27 M      | 154.67 M                  |
| cifar_hcgnet_a2 | 3,133,679  | 488.67 M      | 489.38 M                  |

The authors' counter does not know dilation, so that it takes the dilated convolutions' maps for two pixels wider than
they are.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from models.layers import Straight
from models.registry import register

_GROWTHS = {"a1": (12, 24, 36), "a2": (24, 36, 64)}
_UNITS = 8
_BOTTLENECK = 4


class BRC(nn.Sequential):
    """Batch norm, ReLU and a convolution without bias that keeps the size (but for its stride)."""

    def __init__(self, inputs: int, outputs: int, kernel: int, stride: int = 1, groups: int = 1, dilation: int = 1):
        super().__init__()
        padding = dilation * (kernel - 1) // 2
        self.bn = nn.BatchNorm2d(inputs)
        self.relu = nn.ReLU()
        self.conv = nn.Conv2d(inputs, outputs, kernel, stride, padding, dilation, groups, bias=False)


class Gate(nn.Module):
    """The core of a unit and of a transition: [n, c, h, w] stays so.

    u3 and u5 are depthwise convolutions of u, 3x3 and 3x3 with dilation 2. Each of u3, u5 and u is pooled to [n, c]
    with its own attention over positions. From pool(u3) and pool(u5) comes their mixture `new`, weighed by attention
    over the two per channel, and from pool(u) the forget gate q; the output is u q + new.

    Args:
        channels: c.
        reduction: of the hidden layers of attention (from 2c) and forget gate (from c).
    """

    def __init__(self, channels: int, reduction: int) -> None:
        super().__init__()
        c, attention, forget = channels, 2 * channels // reduction, channels // reduction
        self.conv_3x3 = BRC(c, c, 3, groups=c)
        self.conv_5x5 = BRC(c, c, 3, groups=c, dilation=2)
        self.ctx3 = nn.Conv2d(c, 1, 1)
        self.ctx5 = nn.Conv2d(c, 1, 1)
        self.fcall = nn.Linear(2 * c, attention)
        self.bn_att = nn.BatchNorm1d(attention)
        self.fc3 = nn.Linear(attention, c)
        self.fc5 = nn.Linear(attention, c)
        self.ctx_forget = nn.Conv2d(c, 1, 1)
        self.bn_forget = nn.BatchNorm1d(forget)
        self.fc1 = nn.Linear(c, forget)
        self.fc2 = nn.Linear(forget, c)

    def forward(self, u: Tensor) -> Tensor:
        u3, u5 = self.conv_3x3(u), self.conv_5x5(u)
        s3, s5 = _attend(u3, self.ctx3), _attend(u5, self.ctx5)
        z = torch.tanh(self.bn_att(self.fcall(torch.cat([s3, s5], dim=1))))
        a3, a5 = torch.softmax(torch.stack([self.fc3(z), self.fc5(z)]), dim=0)
        new = a3 * s3 + a5 * s5
        forget = torch.tanh(self.bn_forget(self.fc1(_attend(u, self.ctx_forget))))
        q = torch.sigmoid(self.fc2(forget))
        return u * q[:, :, None, None].to(u.dtype) + new[:, :, None, None].to(u.dtype)


def _attend(z: Tensor, context: nn.Conv2d) -> Tensor:
    """The sum over positions of z [n, c, h, w], weighted by the softmax over positions of context(z): [n, c]."""
    weights = torch.softmax(context(z).flatten(2), dim=2).view(z.shape[0], 1, z.shape[2], z.shape[3])
    return (z * weights).sum((2, 3))


class SMG(nn.Module):
    """A unit: [n, inputs, h, w] to [n, inputs + growth, h, w], its input with `growth` channels appended."""

    def __init__(self, inputs: int, growth: int) -> None:
        super().__init__()
        self.conv1 = BRC(inputs, _BOTTLENECK * growth, 1)
        self.conv2 = BRC(_BOTTLENECK * growth, growth, 3, groups=4)
        self.gate = Gate(growth, reduction=2)

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([x, self.gate(self.conv2(self.conv1(x)))], dim=1)


def transition(inputs: int) -> nn.Sequential:
    """[n, inputs, h, w] to [n, inputs / 2, h / 2, w / 2]."""
    outputs = inputs // 2
    inner = inputs - (inputs - outputs) // 2
    return nn.Sequential(BRC(inputs, inner, 1), BRC(inner, outputs, 3, stride=2), Gate(outputs, reduction=4))


def block(inputs: int, growth: int) -> tuple[nn.Sequential, int]:
    """Eight units, and the channels that they give."""
    units = (SMG(inputs + i * growth, growth) for i in range(_UNITS))
    return nn.Sequential(*units), inputs + _UNITS * growth


class HCGNet(Straight):
    """The network: [n, in_channels, h, w] to logits [n, num_classes]; n at least 2 in training.

    The feature maps of stage 1 and 2 are taken after the transitions, and that of stage 3 after the last block. For A1
    and 32x32 images they are [n, 60, 16, 16], [n, 126, 8, 8] and [n, 414, 8, 8]; the pooled feature, the input of `fc`,
    is [n, 414]. Any h and w will do. Initialisation: PyTorch's.
    """

    stages = ("trans1", "trans2", "block3")

    def __init__(self, growths: tuple[int, int, int], num_classes: int, in_channels: int) -> None:
        super().__init__(num_classes)
        channels = 2 * growths[0]
        self.conv1 = nn.Conv2d(in_channels, channels, 3, padding=1, bias=False)
        self.block1, channels = block(channels, growths[0])
        self.trans1 = transition(channels)
        self.block2, channels = block(channels // 2, growths[1])
        self.trans2 = transition(channels)
        self.block3, channels = block(channels // 2, growths[2])
        self.bn = nn.BatchNorm2d(channels)
        self.relu = nn.ReLU()
        self.avgpool = nn.AdaptiveAvgPool2d(1)
        self.flatten = nn.Flatten()
        self.fc = nn.Linear(channels, num_classes)


@register(
    r"cifar_hcgnet_(?P<size>a1|a2)",
    examples=["cifar_hcgnet_a1", "cifar_hcgnet_a2"],
    family="HCGNet",
    source="Yang et al. 2020; MCL, L-MCL",
)
def cifar_hcgnet(size: str, num_classes: int, in_channels: int = 3) -> HCGNet:
    """Build an HCGNet.

    Args:
        size: "a1" or "a2".
        num_classes: outputs.
        in_channels: channels of the images.
    """
    return HCGNet(_GROWTHS[size], num_classes, in_channels)

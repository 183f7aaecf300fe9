"""DenseNets for small images: three dense blocks with two transitions between them.

Source: Huang et al., "Densely Connected Convolutional Networks" (CVPR 2017). With 3 channels and 100 classes:

| name                        | what it is                                              | parameters | multiply-adds |
| --------------------------- | ------------------------------------------------------- | ---------- | ------------- |
| cifar_densenet_bc_40_12     | bottlenecks, compression 0.5: OKDDip's DenseNet-40-12   | 188,092    | 72.38 M       |
| cifar_densenet_bc_40_12_pcl | the same with no batch norm after the last block: PCL's | 187,828    | 72.38 M       |
| cifar_densenet_40_12        | neither: the paper's own, which CL (Song & Chai) names  | 1,060,132  | 264.9 M       |
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from models.errors import blocks_per_stage
from models.layers import Straight, kaiming_convolutions, probability
from models.registry import register


class DenseLayer(nn.Sequential):
    """x with `growth` channels appended: dropout(conv3x3(relu(bn(y)))).

    y is x, or in a bottleneck conv1x1(relu(bn(x))) of four times `growth` channels.
    """

    def __init__(self, inputs: int, growth: int, bottleneck: bool, dropout: float) -> None:
        super().__init__()
        if bottleneck:
            self.bn1 = nn.BatchNorm2d(inputs)
            self.relu1 = nn.ReLU()
            self.conv1 = nn.Conv2d(inputs, 4 * growth, 1, bias=False)
            self.dropout1 = nn.Dropout(dropout)
            inputs = 4 * growth
        self.bn2 = nn.BatchNorm2d(inputs)
        self.relu2 = nn.ReLU()
        self.conv2 = nn.Conv2d(inputs, growth, 3, padding=1, bias=False)
        self.dropout2 = nn.Dropout(dropout)

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([x, super().forward(x)], dim=1)


class CifarDenseNet(Straight):
    """The network: [n, in_channels, h, w] to logits [n, num_classes].

    The feature maps of stage 1 and 2 are taken after the transitions, where PCL and OKDDip cut, and that of stage 3
    after the last block, before batch norm and ReLU. For 40-12 BC and 32x32 images they are [n, 48, 16, 16],
    [n, 60, 8, 8] and [n, 132, 8, 8]; the pooled feature, the input of `fc`, is [n, 132]. Any h and w will do.

    Initialisation: convolutions normal with std sqrt(2 / fan_in), batch norm 1 and 0, linear PyTorch's.
    """

    stages = ("trans1", "trans2", "block3")

    def __init__(
        self,
        layers: int,
        growth: int,
        num_classes: int,
        in_channels: int,
        dropout: float,
        *,
        bc: bool,
        final_norm: bool,
    ) -> None:
        super().__init__(num_classes)

        def block(inputs: int) -> tuple[nn.Sequential, int]:
            parts = [DenseLayer(inputs + i * growth, growth, bc, dropout) for i in range(layers)]
            return nn.Sequential(*parts), inputs + layers * growth

        def transition(inputs: int) -> tuple[nn.Sequential, int]:
            outputs = inputs // 2 if bc else inputs
            convolution = nn.Conv2d(inputs, outputs, 1, bias=False)
            return nn.Sequential(
                nn.BatchNorm2d(inputs), nn.ReLU(), convolution, nn.Dropout(dropout), nn.AvgPool2d(2)
            ), outputs

        channels = 2 * growth if bc else 16
        self.conv1 = nn.Conv2d(in_channels, channels, 3, padding=1, bias=False)
        self.block1, channels = block(channels)
        self.trans1, channels = transition(channels)
        self.block2, channels = block(channels)
        self.trans2, channels = transition(channels)
        self.block3, channels = block(channels)
        if final_norm:
            self.bn = nn.BatchNorm2d(channels)
        self.relu = nn.ReLU()
        self.avgpool = nn.AdaptiveAvgPool2d(1)
        self.flatten = nn.Flatten()
        self.fc = nn.Linear(channels, num_classes)
        kaiming_convolutions(self, "fan_in")


@register(
    r"cifar_densenet_bc_(?P<depth>[1-9]\d*)_(?P<growth>[1-9]\d*)(?P<form>|_pcl)",
    examples=["cifar_densenet_bc_40_12", "cifar_densenet_bc_40_12_pcl"],
    family="DenseNet",
    source="Huang et al. 2017; OKDDip, pcl: PCL",
)
def cifar_densenet_bc(
    depth: int, growth: int, form: str, num_classes: int, in_channels: int = 3, *, dropout: float = 0.0
) -> CifarDenseNet:
    """Build a DenseNet-BC.

    Args:
        depth: 6n+4 weighted layers, n bottleneck layers of two convolutions in each block.
        growth: channels that each layer appends.
        form: "" or, for no batch norm after the last block, "_pcl".
        num_classes: outputs.
        in_channels: channels of the images.
        dropout: probability, after each convolution but the first.

    Raises:
        UnknownNetwork: the depth is not 6n+4.
        ValueError: the dropout is no number in [0, 1).
    """
    layers = blocks_per_stage(depth, 4)
    dropout = probability("dropout", dropout)
    return CifarDenseNet(layers, growth, num_classes, in_channels, dropout, bc=True, final_norm=not form)


@register(
    r"cifar_densenet_(?P<depth>[1-9]\d*)_(?P<growth>[1-9]\d*)",
    examples=["cifar_densenet_40_12"],
    family="DenseNet",
    source="Huang et al. 2017; CL",
)
def cifar_densenet(
    depth: int, growth: int, num_classes: int, in_channels: int = 3, *, dropout: float = 0.0
) -> CifarDenseNet:
    """Build a DenseNet without bottlenecks and compression.

    Args:
        depth: 3n+4 weighted layers, n in each block.
        growth: channels that each layer appends.
        num_classes: outputs.
        in_channels: channels of the images.
        dropout: probability, after each convolution but the first; CL has 0.2.

    Raises:
        UnknownNetwork: the depth is not 3n+4.
        ValueError: the dropout is no number in [0, 1).
    """
    layers = blocks_per_stage(depth, 4, 3)
    dropout = probability("dropout", dropout)
    return CifarDenseNet(layers, growth, num_classes, in_channels, dropout, bc=False, final_norm=True)

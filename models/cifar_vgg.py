"""VGG-16 for 32x32 images, with batch norm: five stages of 3x3 convolutions, each up to its pooling, and an MLP.

Source: Simonyan & Zisserman (ICLR 2015), in the form of PCL and OKDDip: convolutions with bias, 512-512-512-C at the
end. With 3 channels and 100 classes it has 15,299,748 parameters, 7,640,640 of them up to PCL's cut after `block4`, and
313.8 M multiply-adds. The networks with branches of OKDDip's code (ONE's and CL-ILR's too) have
dropout 0.5, all others 0.
"""

from __future__ import annotations

from torch import nn

from models.layers import Straight, kaiming_convolutions, probability
from models.registry import register


class CifarVGG(Straight):
    """The network: [n, in_channels, h, w] to logits [n, num_classes], h and w at least 32.

    For 32x32 images the stages give [n, 64, 16, 16], [n, 128, 8, 8], [n, 256, 4, 4], [n, 512, 2, 2], [n, 512, 1, 1].
    The pooled feature is the input of the whole MLP, [n, 512].

    Initialisation: convolutions normal with std sqrt(2 / fan_out), their biases PyTorch's, batch norm 1 and 0, linear
    weights normal with std 0.01, linear biases 0.
    """

    stages = ("block1", "block2", "block3", "block4", "block5")
    pooled = "classifier"

    def __init__(self, num_classes: int, in_channels: int, dropout: float) -> None:
        super().__init__(num_classes)
        self.block1 = _block(in_channels, 64, 2)
        self.block2 = _block(64, 128, 2)
        self.block3 = _block(128, 256, 3)
        self.block4 = _block(256, 512, 3)
        self.block5 = _block(512, 512, 3)
        self.avgpool = nn.AdaptiveAvgPool2d(1)  # changes nothing at 32x32
        self.flatten = nn.Flatten()
        self.classifier = nn.Sequential(
            nn.Linear(512, 512),
            nn.ReLU(),
            nn.Dropout(dropout),
            nn.Linear(512, 512),
            nn.ReLU(),
            nn.Dropout(dropout),
            nn.Linear(512, num_classes),
        )
        kaiming_convolutions(self)
        for module in self.classifier:
            if isinstance(module, nn.Linear):
                nn.init.normal_(module.weight, std=0.01)
                nn.init.zeros_(module.bias)


def _block(inputs: int, outputs: int, convolutions: int) -> nn.Sequential:
    layers: list[nn.Module] = []
    for _ in range(convolutions):
        layers += [nn.Conv2d(inputs, outputs, 3, padding=1), nn.BatchNorm2d(outputs), nn.ReLU()]
        inputs = outputs
    return nn.Sequential(*layers, nn.MaxPool2d(2))


@register(r"cifar_vgg16", examples=["cifar_vgg16"], family="VGG", source="Simonyan & Zisserman 2015; PCL, OKDDip")
def cifar_vgg16(num_classes: int, in_channels: int = 3, *, dropout: float = 0.0) -> CifarVGG:
    """Build VGG-16.

    Args:
        num_classes: outputs.
        in_channels: channels of the images.
        dropout: probability, after each hidden layer of the MLP.

    Raises:
        ValueError: the dropout is no number in [0, 1).
    """
    return CifarVGG(num_classes, in_channels, probability("dropout", dropout))

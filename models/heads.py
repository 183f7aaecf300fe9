"""What methods attach to a network and leave behind at export, each once for all methods.

An auxiliary classifier goes on where a stage ends. The rule for any network: **repeat the remaining stages, pooling and
classifier, with weights of their own**, so that every head sees maps as small, and pooled features as wide, as the
network's own classifier. L-MCL's extractors follow it. Designs that differ from the rule:

| design | network                 | after stage | what is repeated                                                |
| ------ | ----------------------- | ----------- | --------------------------------------------------------------- |
| `dcm`  | cifar_wrn               | 1           | stage 2, and half the blocks of stage 3                         |
| `dcm`  | cifar_wrn               | 2           | stage 3, twice as wide                                          |
| `dcm`  | cifar_mobilenet         | 1           | 4 of the 6 blocks of stage 2, and stage 3                       |
| `dcm`  | cifar_mobilenet         | 2           | stage 3, twice as wide                                          |
| `lmcl` | ImageNet's ResNets      | 1 .. 3      | the remaining stages with one block each                        |
| `lmcl` | ImageNet's ShuffleNetV2 | 1           | the remaining stages with one block beside the one that shrinks |
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from functools import partial
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

from models.cifar_mobilenet import separables
from models.features import pooled_features
from models.layers import Straight, kaiming_convolutions
from models.layers import stage as stage_of
from models.registry import create
from models.stages import Taps, cut, stages
from models.wide_resnet import PreActBlock

DESIGNS = ("rule", "dcm", "lmcl")


class Auxiliary(nn.Module):
    """An auxiliary classifier: the map of a stage [N, c, h, w] -> `logits` [N, C] and pooled `features` [N, D]."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network
        classifier, self.num_features = pooled_features(network)
        self._taps = Taps(network, {}, {"features": classifier})

    def forward(self, maps: Tensor) -> dict[str, Tensor]:
        return {"logits": self.network(maps), **self._taps.take()}


class Projection(nn.Module):
    """MCL's embedding head: Linear - ReLU - Linear, then rows of unit length. [N, inputs] -> [N, outputs]."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(inputs, outputs), nn.ReLU(), nn.Linear(outputs, outputs))

    def forward(self, features: Tensor) -> Tensor:
        return F.normalize(self.layers(features).float(), dim=-1)


def auxiliary(
    name: str,
    options: Mapping[str, Any],
    num_classes: int,
    in_channels: int,
    image_size: int,
    stage: int,
    design: str = "rule",
) -> Auxiliary:
    """Builds an auxiliary classifier that goes on after a stage of the network `name`.

    Args:
        name: of the network, and its `options`.
        options: as for `create`.
        num_classes: C.
        in_channels: channels of the network's images.
        image_size: side of the network's images.
        stage: j = 1 .. S-1.
        design: one of DESIGNS.

    Raises:
        ValueError: the design is unknown, or the network has no stage j to go on after.
    """
    if design not in DESIGNS:
        raise ValueError(f"design {design!r}; expected one of {', '.join(DESIGNS)}")
    if design == "dcm" and (wide := re.fullmatch(r"cifar_wrn_(\d+)_(\d+)", name)) and stage in (1, 2):
        return Auxiliary(_dcm_wide(int(wide[1]), int(wide[2]), num_classes, stage))
    if design == "dcm" and name == "cifar_mobilenet" and stage in (1, 2):
        return Auxiliary(_dcm_mobilenet(num_classes, stage))
    if design == "lmcl" and stage == 1 and name in _SHUFFLENETS:
        network: nn.Module = _short_shufflenet(name, num_classes, in_channels)
    elif design == "lmcl" and (resnet := re.fullmatch(r"(?:(?:timm|torchvision)/)?resnet(18|34|50|101|152)", name)):
        network = _one_block_a_stage(int(resnet[1]), num_classes, in_channels)
    else:
        network = create(name, num_classes, in_channels, **options)
    found = stages(network, in_channels, image_size)
    if not 1 <= stage < len(found):
        raise ValueError(f"network {name!r}: no stage {stage} to go on after; expected 1 .. {len(found) - 1}")
    _, rest = cut(network, found[stage - 1].module)
    rest.num_classes = num_classes  # type: ignore[assignment]
    return Auxiliary(rest)


class _Classifier(Straight):
    """Stages, and the pooling and classifier of the network that they are taken from."""

    def __init__(self, num_classes: int, body: list[nn.Module], width: int) -> None:
        super().__init__(num_classes)
        self.body = nn.Sequential(*body)
        self.avgpool = nn.AdaptiveAvgPool2d(1)
        self.flatten = nn.Flatten()
        self.fc = nn.Linear(width, num_classes)


def _dcm_wide(depth: int, k: int, num_classes: int, stage: int) -> nn.Module:
    blocks, block = (depth - 4) // 6, partial(PreActBlock, dropout=0.0)
    if stage == 1:
        if blocks < 2:
            raise ValueError(
                f"DCM's classifier after stage 1 halves the {blocks} block of stage 3; expected depth >= 16"
            )
        body = [stage_of(block, 16 * k, 32 * k, 2, blocks), stage_of(block, 32 * k, 64 * k, 2, blocks // 2)]
    else:
        body = [stage_of(block, 32 * k, 128 * k, 2, blocks)]
    width = 64 * k * stage
    network = _Classifier(num_classes, [*body, nn.BatchNorm2d(width), nn.ReLU()], width)
    kaiming_convolutions(network)
    nn.init.zeros_(network.fc.bias)
    return network


def _dcm_mobilenet(num_classes: int, stage: int) -> nn.Module:
    if stage == 1:
        return _Classifier(num_classes, [separables(256, (512,) * 4, 2), separables(512, (1024, 1024), 2)], 1024)
    return _Classifier(num_classes, [separables(512, (2048, 2048), 2)], 2048)


_SHUFFLENETS = {
    "torchvision/shufflenet_v2_x0_5": [24, 48, 96, 192, 1024],
    "torchvision/shufflenet_v2_x1_0": [24, 116, 232, 464, 1024],
}


def _short_shufflenet(name: str, num_classes: int, in_channels: int) -> nn.Module:
    from torchvision.models.shufflenetv2 import ShuffleNetV2

    network = ShuffleNetV2([2, 2, 2], _SHUFFLENETS[name], num_classes=num_classes)
    if in_channels != 3:
        network.conv1[0] = nn.Conv2d(in_channels, 24, 3, 2, padding=1, bias=False)
    return network


def _one_block_a_stage(depth: int, num_classes: int, in_channels: int) -> nn.Module:
    from torchvision.models.resnet import BasicBlock, Bottleneck, ResNet

    network = ResNet(BasicBlock if depth < 50 else Bottleneck, [1, 1, 1, 1], num_classes=num_classes)
    if in_channels != 3:
        network.conv1 = nn.Conv2d(in_channels, 64, 7, 2, padding=3, bias=False)
    return network

"""Networks of torchvision and timm with the stem of small images: the ones that Deep Communication Learning trains.

The first convolution is 3x3 with stride 1, and the poolings that follow it are gone; all else is the library's. With
100 classes and 3 channels, one 32x32 image:

| name                       | taken from                     | parameters | multiply-adds |
| -------------------------- | ------------------------------ | ---------- | ------------- |
| cifar_stem_resnet18        | torchvision resnet18           | 11,220,132 | 0.555 G       |
| cifar_stem_inception_v1    | torchvision googlenet, no aux  | 5,694,724  | 1.451 G       |
| cifar_stem_densenet121     | torchvision densenet121        | 7,048,676  | 0.888 G       |
| cifar_stem_resnext50       | torchvision resnext50_32x4d    | 23,177,124 | 1.344 G       |
| cifar_stem_efficientnet_b3 | timm tf_efficientnet_b3        | 10,849,932 | 0.080 G       |
| cifar_stem_mobilenet_v2    | torchvision mobilenet_v2       | 2,351,972  | 0.025 G       |

Where DCL's code does something else, and we do not:

- EfficientNet-B3 of 1 channel has a stem of stride 2 there; here it has stride 1 for any number of channels.
- Inception-V1 cannot run there unless pre-trained; here it can. DCL's has torchvision's `transform_input` on, which is
  an option here (3 channels only); pre-trained weights need it.

The new convolution and the classifier start as PyTorch has it, and the rest as the library has it.
`pretrained: true` takes torchvision's ImageNet weights for the rest, of the version that DCL had (IMAGENET1K_V1); like
DCL's, EfficientNet-B3 has none.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, cast

from torch import Tensor, nn

from models.errors import WeightsError
from models.layers import probability
from models.libraries import expects_transform, torchvision_url, torchvision_weights
from models.pretrained import Published
from models.registry import register


@dataclass(frozen=True)
class _Change:
    """What becomes of one of torchvision's networks."""

    original: str
    stem: str
    """The first convolution."""
    poolings: tuple[str, ...]
    classifier: str
    stages: tuple[str, ...]
    """The submodules that give the feature maps of the stages, one a size."""


_LAYERS = ("layer1", "layer2", "layer3", "layer4")
_CHANGES = {
    "resnet18": _Change("resnet18", "conv1", ("maxpool",), "fc", _LAYERS),
    "resnext50": _Change("resnext50_32x4d", "conv1", ("maxpool",), "fc", _LAYERS),
    "inception_v1": _Change(
        "googlenet", "conv1.conv", ("maxpool1", "maxpool2"), "fc", ("inception3b", "inception4e", "inception5b")
    ),
    "densenet121": _Change(
        "densenet121",
        "features.conv0",
        ("features.pool0",),
        "classifier",
        ("features.transition1", "features.transition2", "features.transition3", "features.denseblock4"),
    ),
    "mobilenet_v2": _Change(
        "mobilenet_v2",
        "features.0.0",
        (),
        "classifier.1",
        ("features.1", "features.3", "features.6", "features.13", "features.17"),
    ),
}


def _weights(network: str, in_channels: int, options: Mapping[str, Any]) -> Published:
    if network not in _CHANGES:
        raise WeightsError("pretrained: true; nobody publishes weights of it; expected false or the path of a file")
    change = _CHANGES[network]
    expects_transform(change.original, in_channels, options)
    fresh = {f"{change.stem}.weight", f"{change.classifier}.weight", f"{change.classifier}.bias"}

    def fetch(_: nn.Module) -> Mapping[str, Tensor]:
        state = torchvision_weights(change.original, "IMAGENET1K_V1")
        return {name: tensor for name, tensor in state.items() if name not in fresh}

    return Published(fetch, torchvision_url(change.original, "IMAGENET1K_V1"), fresh)


@register(
    r"cifar_stem_(?P<network>resnet18|densenet121|resnext50|mobilenet_v2)",
    examples=[f"cifar_stem_{network}" for network in ("resnet18", "densenet121", "resnext50", "mobilenet_v2")],
    family="CIFAR stem",
    source="torchvision; DCL",
    published=_weights,
)
def cifar_stem(network: str, num_classes: int, in_channels: int = 3) -> nn.Module:
    """Build one of torchvision's networks with the stem of small images: [n, in_channels, h, w] to [n, num_classes].

    Args:
        network: which one.
        num_classes: outputs.
        in_channels: channels of the images.
    """
    return _from_torchvision(_CHANGES[network], num_classes, in_channels)


@register(
    r"cifar_stem_(?P<network>inception_v1)",
    examples=["cifar_stem_inception_v1"],
    family="CIFAR stem",
    source="torchvision; DCL",
    published=_weights,
)
def cifar_stem_inception(
    network: str, num_classes: int, in_channels: int = 3, *, transform_input: bool = False
) -> nn.Module:
    """Build Inception-V1 with the stem of small images and without auxiliary classifiers.

    Args:
        network: "inception_v1".
        num_classes: outputs.
        in_channels: channels of the images.
        transform_input: take images that are normalised with ImageNet's mean and standard deviation, and rescale them
            to what torchvision's pre-trained weights expect.

    Raises:
        ValueError: the images to transform have not 3 channels.
    """
    if not isinstance(transform_input, bool):
        raise ValueError(f"option 'transform_input' is {transform_input!r}; expected true or false")
    if transform_input and in_channels != 3:
        raise ValueError(f"option 'transform_input' is for images of 3 channels, not {in_channels}")
    options = {"aux_logits": False, "init_weights": True, "transform_input": transform_input}
    return _from_torchvision(_CHANGES[network], num_classes, in_channels, **options)


@register(
    r"cifar_stem_(?P<network>efficientnet_b3)",
    examples=["cifar_stem_efficientnet_b3"],
    family="CIFAR stem",
    source="timm; DCL",
    published=_weights,
)
def cifar_stem_efficientnet(
    network: str,
    num_classes: int,
    in_channels: int = 3,
    *,
    drop_rate: float = 0.3,
    drop_path_rate: float = 0.2,
) -> nn.Module:
    """Build EfficientNet-B3 with a first convolution of stride 1.

    It is TensorFlow's network, as DCL's: "same" padding, batch norm with eps 1e-3 and momentum 0.01.

    Args:
        network: "efficientnet_b3".
        num_classes: outputs.
        in_channels: channels of the images.
        drop_rate: dropout before the classifier.
        drop_path_rate: drop-connect of the last block; it grows linearly from 0 with depth.

    Raises:
        ValueError: a rate is no number in [0, 1).
    """
    import timm

    built = cast(
        nn.Module,
        timm.create_model(
            f"tf_{network}",
            pretrained=False,
            num_classes=num_classes,
            in_chans=in_channels,
            drop_rate=probability("drop_rate", drop_rate),
            drop_path_rate=probability("drop_path_rate", drop_path_rate),
            bn_eps=1e-3,
            bn_momentum=0.01,
        ),
    )
    stem = cast(nn.Conv2d, built.conv_stem)
    stem.stride = (1, 1)
    built.stages = ("blocks.0", "blocks.1", "blocks.2", "blocks.4", "blocks.6")  # type: ignore[assignment]
    return built


def _from_torchvision(change: _Change, num_classes: int, in_channels: int, **options: Any) -> nn.Module:
    from torchvision import models

    build = cast(Callable[..., nn.Module], models.get_model)
    network = build(change.original, weights=None, num_classes=num_classes, **options)
    old = network.get_submodule(change.stem)
    assert isinstance(old, nn.Conv2d)
    _put(network, change.stem, nn.Conv2d(in_channels, old.out_channels, 3, padding=1, bias=False))
    for pooling in change.poolings:
        _put(network, pooling, nn.Identity())
    network.num_classes = num_classes  # type: ignore[assignment]
    network.stages = change.stages  # type: ignore[assignment]
    return network


def _put(network: nn.Module, path: str, module: nn.Module) -> None:
    parent, _, name = path.rpartition(".")
    setattr(network.get_submodule(parent), name, module)

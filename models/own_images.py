"""How a network of timm or torchvision wants images shown when it is scored, as its library publishes it."""

from __future__ import annotations

import math
from dataclasses import dataclass


@dataclass(frozen=True)
class OwnImages:
    """What a library says of a network's images.

    Attributes:
        size: side of the images that the network sees, in pixels.
        resize: shorter side before the middle is cut out, in pixels.
        interpolation: bilinear or bicubic.
        mean: of each channel, of pixels scaled to [0, 1].
        std: likewise.
    """

    size: int
    resize: int
    interpolation: str
    mean: tuple[float, ...]
    std: tuple[float, ...]


def own_images(network: str) -> OwnImages:
    """What the library of a network publishes: timm's `pretrained_cfg`, torchvision's newest weights.

    Args:
        network: timm/NAME or torchvision/NAME.

    Raises:
        ValueError: nobody says it of this network, or it wants what cannot be shown.
    """
    library, _, name = network.partition("/")
    if library == "timm":
        return _of_timm(network, name)
    if library == "torchvision":
        return _of_torchvision(name)
    raise ValueError(
        f"{network} is our own, and nobody says how it wants images; expected a network of timm/ or torchvision/"
    )


def _of_timm(network: str, name: str) -> OwnImages:
    from timm.data import resolve_data_config
    from timm.models import get_pretrained_cfg

    found = get_pretrained_cfg(name)
    if found is None:
        raise ValueError(f"timm says nothing of the images of {name}")
    wanted = resolve_data_config(pretrained_cfg=found.to_dict())
    _, height, width = wanted["input_size"]
    if height != width or wanted["crop_mode"] != "center" or wanted["interpolation"] not in ("bilinear", "bicubic"):
        raise ValueError(
            f"{network} wants {height} x {width} pixels, crop {wanted['crop_mode']}, {wanted['interpolation']}; only "
            "the middle of a square, bilinear or bicubic, can be shown"
        )
    resize = math.floor(height / wanted["crop_pct"])
    return OwnImages(height, resize, wanted["interpolation"], tuple(wanted["mean"]), tuple(wanted["std"]))


def _of_torchvision(name: str) -> OwnImages:
    from torchvision.models import get_model_weights

    wanted = get_model_weights(name)["DEFAULT"].transforms()
    return OwnImages(
        wanted.crop_size[0], wanted.resize_size[0], wanted.interpolation.value, tuple(wanted.mean), tuple(wanted.std)
    )

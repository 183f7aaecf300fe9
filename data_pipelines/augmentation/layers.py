"""One operation for each image of a batch, not the same for all: what is drawn, and how it is done.

Which image gets which operation is known on the host, so images of one operation are taken together, worked on as a
batch of their own, and put back; nothing has to be looked up on the device.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from data_pipelines.augmentation import pointwise, spatial
from data_pipelines.order import Rows

WIDTH = spatial.BLUR + 1
"""Numbers that an operation is given for an image."""

_POINTWISE = {
    "brightness": pointwise.brightness,
    "contrast": pointwise.contrast,
    "saturation": pointwise.saturation,
    "sharpness": pointwise.sharpness,
    "hue": pointwise.hue,
    "grayscale": pointwise.grayscale,
    "posterize": pointwise.posterize,
    "solarize": pointwise.solarize,
    "solarize_add": pointwise.solarize_add,
    "autocontrast": pointwise.autocontrast,
    "equalize": pointwise.equalize,
    "invert": pointwise.invert,
}
_OPERATIONS = (*_POINTWISE, "affine", "gaussian_blur")


@dataclass(frozen=True)
class Layer:
    """What is done to some images of a batch.

    Attributes:
        rows: the images, those of one operation side by side, int64 [n].
        parts: (operation, how many images).
        numbers: of each image, float32 [n, WIDTH].
    """

    rows: NDArray[np.int64]
    parts: Sequence[tuple[str, int]]
    numbers: NDArray[np.float32]


@dataclass(frozen=True)
class Wish:
    """An operation for some images of a global batch.

    Attributes:
        name: torchvision's or timm's, such as ShearX, in lower case.
        chosen: which images, bool [G].
        magnitudes: float64 [G].
    """

    name: str
    chosen: NDArray[np.bool_]
    magnitudes: NDArray[np.float64]


def layer(wishes: Sequence[Wish], rows: Rows, side: int) -> Layer:
    """Makes a layer of wishes, no two for one image, for the rows of a rank.

    Args:
        wishes: for the global batch.
        rows: of it.
        side: of the images, in pixels.
    """
    count = len(wishes[0].chosen)
    operations = np.full(count, -1)
    numbers = np.zeros((count, WIDTH))
    for wish in wishes:
        operation, values = _encoded(wish.name, wish.magnitudes[wish.chosen], side)
        if operation is not None:
            operations[wish.chosen] = _OPERATIONS.index(operation)
            numbers[wish.chosen, : values.shape[1]] = values
    operations = operations[rows]
    order = np.argsort(operations, kind="stable")
    order = order[operations[order] >= 0].astype(np.int64)
    kinds, counts = np.unique(operations[order], return_counts=True)
    parts = [(_OPERATIONS[kind], int(count)) for kind, count in zip(kinds, counts, strict=True)]
    return Layer(order, parts, numbers[rows][order].astype(np.float32))


def apply(
    images: Tensor, parts: Sequence[tuple[str, int]], rows: Tensor, numbers: Tensor, *, bilinear: bool, fill: Tensor
) -> Tensor:
    """Does what a layer says; its arrays have become tensors. uint8 [N, C, H, W] -> the same, changed in place."""
    begin = 0
    for name, count in parts:
        end = begin + count
        where, given = rows[begin:end], numbers[begin:end]
        taken = images.index_select(0, where)
        if name == "affine":
            changed = spatial.affine(taken, given, bilinear=bilinear, fill=fill)
        elif name == "gaussian_blur":
            changed = spatial.gaussian_blur(taken, given)
        else:
            changed = _POINTWISE[name](taken, given)
        images.index_copy_(0, where, changed)
        begin = end
    return images


def _encoded(name: str, m: NDArray[np.float64], side: int) -> tuple[str | None, NDArray[np.float64]]:
    """What is done on the device for an operation of this name with magnitudes [n], and what numbers it gets."""
    one, none = np.ones_like(m), np.zeros_like(m)
    if name == "identity":
        return None, none[:, None]
    if name == "shearx":
        return "affine", np.stack([one, m, none, none, one, none], 1)
    if name == "sheary":
        return "affine", np.stack([one, none, none, m, one, none], 1)
    if name == "translatex":
        return "affine", np.stack([one, none, -m, none, one, none], 1)
    if name == "translatey":
        return "affine", np.stack([one, none, none, none, one, -m], 1)
    if name == "rotate":  # about the middle, m degrees counter-clockwise
        cos, sin, half = np.cos(np.radians(m)), np.sin(np.radians(m)), side / 2
        return "affine", np.stack([cos, -sin, half * (1 - cos + sin), sin, cos, half * (1 - cos - sin)], 1)
    if name == "posterize":  # m bits are kept
        kept = np.clip(m, 0, 8).astype(int)
        return "posterize", (((1 << kept) - 1) << (8 - kept)).astype(float)[:, None]
    if name == "gaussian_blur":  # a sigma of m
        weights = np.exp(-0.5 * (np.arange(WIDTH) / m[:, None]) ** 2)
        return "gaussian_blur", weights / (weights[:, :1] + 2 * weights[:, 1:].sum(1, keepdims=True))
    return name, m[:, None]

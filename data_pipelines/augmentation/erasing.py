"""Rectangles that are painted over: timm's random erasing, and Cutout."""

from dataclasses import dataclass
from functools import lru_cache
from statistics import NormalDist

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from data_pipelines.augmentation.sections import ErasingConfig
from data_pipelines.order import Rows

_TRIES = 10
_AREAS, _RATIOS = slice(0, _TRIES), slice(_TRIES, 2 * _TRIES)
_TOP, _LEFT, _WHETHER, _SEED = range(2 * _TRIES, 2 * _TRIES + 4)
_OF_ONE = 2 * _TRIES + 4
CUTOUT_COLUMNS = 2
_LEVELS = 1 << 16
_MASK = (1 << 32) - 1


@dataclass(frozen=True)
class Boxes:
    """Rectangles of some images of a batch.

    Attributes:
        rows: the images, int64 [n].
        edges: top, bottom, left, right of each, the pixel after the last for bottom and right: int64 [n, 4].
        seeds: of noise, int64 [n] below 2**32.
    """

    rows: NDArray[np.int64]
    edges: NDArray[np.int64]
    seeds: NDArray[np.int64]


def columns(erasing: ErasingConfig) -> int:
    """Uniform numbers that an image needs."""
    return erasing.max_count * _OF_ONE + (erasing.max_count > 1)


def erasing_boxes(erasing: ErasingConfig, uniforms: NDArray[np.float64], rows: Rows, side: int) -> list[Boxes]:
    """Returns where the rows of a rank are erased, one rectangle of each after another: the first of ten tries that is
    smaller than the image. Of m rectangles each takes 1/m of the area that is drawn for it.

    Args:
        erasing: how often, how large, how many.
        uniforms: in [0, 1), for the global batch: float64 [G, columns(erasing)].
        rows: of it.
        side: of the images, in pixels.
    """
    counts = np.ones(len(uniforms))
    if erasing.max_count > 1:
        counts += np.floor(uniforms[:, -1] * erasing.max_count)
    erased = uniforms[:, _WHETHER] < erasing.prob
    parts = (uniforms[:, at * _OF_ONE : (at + 1) * _OF_ONE] for at in range(erasing.max_count))
    return [_boxes(erasing, part, erased & (at < counts), counts, rows, side) for at, part in enumerate(parts)]


def _boxes(
    erasing: ErasingConfig,
    uniforms: NDArray[np.float64],
    erased: NDArray[np.bool_],
    counts: NDArray[np.float64],
    rows: Rows,
    side: int,
) -> Boxes:
    low, high = erasing.area
    area = (low + uniforms[:, _AREAS] * (high - low)) * side * side / counts[:, None]
    low, high = np.log(erasing.ratio)
    ratio = np.exp(low + uniforms[:, _RATIOS] * (high - low))
    tries = np.rint(np.sqrt(np.stack([area * ratio, area / ratio], 2)))
    fits = (tries < side).all(2)
    sizes = np.take_along_axis(tries, fits.argmax(1)[:, None, None], 1)[:, 0]
    first = np.floor(uniforms[:, [_TOP, _LEFT]] * (side - sizes + 1))
    edges = np.stack([first[:, 0], (first + sizes)[:, 0], first[:, 1], (first + sizes)[:, 1]], 1).astype(np.int64)
    seeds = (uniforms[:, _SEED] * (1 << 32)).astype(np.int64)
    mine = np.flatnonzero((erased & fits.any(1))[rows])
    return Boxes(mine, edges[rows][mine], seeds[rows][mine])


def cutout_boxes(length: int, uniforms: NDArray[np.float64], rows: Rows, side: int) -> Boxes:
    """Returns squares of `length` around a pixel of each image, cut off at the edge (DeVries & Taylor 2017).

    Args:
        length: in pixels.
        uniforms: in [0, 1), for the global batch: float64 [G, CUTOUT_COLUMNS].
        rows: of it.
        side: of the images, in pixels.
    """
    middle = np.floor(uniforms[rows] * side).astype(np.int64)
    first = (middle - length // 2).clip(0, side)
    last = (middle - length // 2 + length).clip(0, side)
    edges = np.stack([first[:, 0], last[:, 0], first[:, 1], last[:, 1]], 1)
    return Boxes(np.arange(len(edges)), edges, np.zeros(len(edges), np.int64))


def erase(images: Tensor, rows: Tensor, edges: Tensor, seeds: Tensor, mode: str) -> None:
    """Paints over the boxes, in place.

    Args:
        images: normalised, float32 [N, C, H, W].
        rows: see `Boxes`, as tensors.
        edges: likewise.
        seeds: likewise.
        mode: const for 0, rand for one normal colour, pixel for normal noise.
    """
    if not len(rows):
        return
    taken = images.index_select(0, rows)
    inside = within(edges, images.shape[2:])
    if mode == "const":
        painted = taken.mul_(~inside)  # half the time of filling
    else:
        painted = torch.where(inside, _noise(seeds, taken.shape[1:], per_pixel=mode == "pixel"), taken)
    images.index_copy_(0, rows, painted)


def within(edges: Tensor, size: torch.Size) -> Tensor:
    """Whether a pixel lies in a box: edges int64 [n, 4], (height, width) -> bool [n, 1, H, W]."""
    top, bottom, left, right = (edge.view(-1, 1, 1, 1) for edge in edges.unbind(1))
    lines = torch.arange(size[0], device=edges.device).view(1, 1, -1, 1)
    columns = torch.arange(size[1], device=edges.device).view(1, 1, 1, -1)
    return (lines >= top) & (lines < bottom) & (columns >= left) & (columns < right)


def _noise(seeds: Tensor, shape: torch.Size, *, per_pixel: bool) -> Tensor:
    """Normal numbers [n, C, H, W] or [n, C, 1, 1] that depend on the row's seed and on the place alone.

    A generator would draw other numbers for a row in other company, and other ones on another device; here a number of
    16 bits is made of seed and place in whole numbers, and looked up.
    """
    shape = shape if per_pixel else torch.Size((shape[0], 1, 1))
    places = torch.arange(shape.numel(), device=seeds.device)
    mixed = _scrambled(_scrambled(seeds)[:, None] ^ _scrambled(places + 1))
    table = _normal_levels(seeds.device)
    return table[mixed >> 16].view(-1, *shape)


def _scrambled(x: Tensor) -> Tensor:
    """A hash of whole numbers below 2**32; no product passes 2**62."""
    for _ in range(2):
        x = (((x >> 16) ^ x) * 0x45D9F3B) & _MASK
    return (x >> 16) ^ x


@lru_cache
def _normal_levels(device: torch.device) -> Tensor:
    """The normal distribution's quantiles at (i + 1/2) / 2**16, float32."""
    inverse = NormalDist().inv_cdf
    return torch.tensor([inverse((i + 0.5) / _LEVELS) for i in range(_LEVELS)], device=device)

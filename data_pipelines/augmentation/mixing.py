"""mixup (Zhang et al. 2018, arXiv 1710.09412) and CutMix (Yun et al. 2019, arXiv 1905.04899), drawn as timm draws them.

An image's partner is its neighbour in the batch, so that no cut of the batch into ranks or micro-batches parts them: of
rows 2m i .. 2m i + 2m - 1 the first m and the last m, m being the images of a class that lie side by side.
"""

from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from data_pipelines.augmentation.erasing import within
from data_pipelines.augmentation.sections import MixingConfig
from data_pipelines.order import Rows

MIXING_COLUMNS = 5
_POINTS = 1 << 14


@dataclass(frozen=True)
class Weights:
    """How the rows of a rank are mixed.

    Attributes:
        own: lambda, how much of its own target an image keeps, float32 [n].
        blended: how much of its own pixels it keeps outside of the box; 1 with CutMix: float32 [n].
        edges: top, bottom, left, right of the partner's box, which is empty with mixup: int64 [n, 4].
    """

    own: NDArray[np.float32]
    blended: NDArray[np.float32]
    edges: NDArray[np.int64]


def mixing_weights(
    mixing: MixingConfig, uniforms: NDArray[np.float64], rows: Rows, side: int, neighbours: int
) -> Weights:
    """Draws lambda, and where there is CutMix a box of area (1 - lambda) H W around any pixel, cut off at the edge.

    Args:
        mixing: how.
        uniforms: in [0, 1), for the global batch: float64 [G, MIXING_COLUMNS].
        rows: of it.
        side: of the images, in pixels.
        neighbours: m, rows of a partner that lie side by side.
    """
    at = np.arange(len(uniforms))
    if mixing.mode == "batch":
        at = np.zeros_like(at)
    elif mixing.mode == "pair":
        at = at // (2 * neighbours) * 2 * neighbours + at % neighbours
    whether, which, weight, *middle = uniforms[at].T
    if mixing.mixup_alpha and mixing.cutmix_alpha:
        cut = which < mixing.switch_prob
    else:
        cut = np.full(len(at), mixing.cutmix_alpha > 0)
    mixup, cutmix = (beta(weight, alpha) if alpha else weight for alpha in (mixing.mixup_alpha, mixing.cutmix_alpha))
    drawn = np.where(whether < mixing.prob, np.where(cut, cutmix, mixup), 1.0)

    half = np.where(cut, np.floor(side * np.sqrt(1 - drawn)), 0).astype(np.int64) // 2
    y, x = (np.floor(side * each).astype(np.int64) for each in middle)
    edges = np.stack([y - half, y + half, x - half, x + half], 1).clip(0, side)
    # The part that the box really takes.
    own = np.where(cut, 1 - (edges[:, 1] - edges[:, 0]) * (edges[:, 3] - edges[:, 2]) / side**2, drawn)
    return Weights(own[rows].astype(np.float32), np.where(cut, 1.0, drawn)[rows].astype(np.float32), edges[rows])


def mix_images(images: Tensor, blended: Tensor, edges: Tensor, neighbours: int) -> Tensor:
    """Returns the mixed images, float32 [n, C, H, W] in channels-last memory.

    Args:
        images: normalised, float32 [n, C, H, W].
        blended: see `Weights`, as tensors.
        edges: likewise.
        neighbours: m.
    """
    other = partners(images, neighbours)
    part = blended.view(-1, 1, 1, 1)
    outside = images * part + other * (1 - part)
    return torch.where(within(edges, images.shape[2:]), other, outside).contiguous(memory_format=torch.channels_last)


def mix_targets(targets: Tensor, own: Tensor, neighbours: int) -> Tensor:
    """lambda y + (1 - lambda) y', y' the partner's. [n, C], [n] -> [n, C]."""
    part = own.view(-1, 1)
    return targets * part + partners(targets, neighbours) * (1 - part)


def smooth(classes: Tensor, num_classes: int, smoothing: float) -> Tensor:
    """Probabilities: smoothing / C for each class, and 1 - smoothing more for the right one. int64 [n] -> [n, C]."""
    spread = torch.full((len(classes), num_classes), smoothing / num_classes, device=classes.device)
    return spread.scatter_(1, classes[:, None], 1 - smoothing + smoothing / num_classes)


def partners(rows: Tensor, neighbours: int) -> Tensor:
    """The rows of each row's partner; their number is a multiple of 2 m."""
    pairs = rows.unflatten(0, (-1, 2, neighbours))
    return pairs.flip(1).flatten(0, 2)


def beta(uniforms: NDArray[np.float64], alpha: float) -> NDArray[np.float64]:
    """Numbers of Beta(alpha, alpha), by the inverse of its distribution function. [n] in [0, 1) -> [n]."""
    heights, powers, exponent = _half_of_beta(alpha)
    # The distribution is symmetric about 1/2.
    lower = np.interp(np.minimum(uniforms, 1 - uniforms), heights, powers) ** (1 / exponent)
    return np.where(uniforms <= 0.5, lower, 1 - lower)


@lru_cache
def _half_of_beta(alpha: float) -> tuple[NDArray[np.float64], NDArray[np.float64], float]:
    """The distribution function from 0 to 1/2, as a table over w = x^p. With p = min(alpha, 1) the density of w is
    x^(alpha - p) (1 - x)^(alpha - 1), which is finite where that of x is not."""
    exponent = min(alpha, 1.0)
    powers = np.linspace(0, 0.5**exponent, _POINTS)
    x = powers ** (1 / exponent)
    density = x ** (alpha - exponent) * (1 - x) ** (alpha - 1)
    heights = np.concatenate([[0.0], np.cumsum((density[1:] + density[:-1]) / 2)])
    return heights * (0.5 / heights[-1]), powers, exponent

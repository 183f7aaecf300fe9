"""Which part of a photo a network sees: the geometry of torchvision's RandomResizedCrop and Resize + CenterCrop.

Pure NumPy, so that the windows of a batch depend on the random numbers and on the sizes of the photos alone. Sizes are
(height, width), in pixels.
"""

import numpy as np
from numpy.typing import NDArray

_TRIES = 10
_AREAS, _RATIOS = slice(0, _TRIES), slice(_TRIES, 2 * _TRIES)
_TOP, _LEFT, _FLIP = 2 * _TRIES, 2 * _TRIES + 1, 2 * _TRIES + 2
COLUMNS = 2 * _TRIES + 3


def crop_draws(
    uniforms: NDArray[np.float64], area: tuple[float, float], ratio: tuple[float, float]
) -> NDArray[np.float64]:
    """Scales the uniform numbers [G, COLUMNS] of a global batch to areas and ratios, in a copy.

    Taken before rows are cut, because NumPy's exp may differ in the last bit with an element's place in the array.

    Args:
        uniforms: in [0, 1), float64 [G, COLUMNS].
        area: least and greatest area of a crop, as a part of the photo.
        ratio: least and greatest width / height of a crop, drawn uniformly in the logarithm.
    """
    draws = uniforms.copy()
    draws[:, _AREAS] = area[0] + uniforms[:, _AREAS] * (area[1] - area[0])
    low, high = np.log(ratio)
    draws[:, _RATIOS] = np.exp(low + uniforms[:, _RATIOS] * (high - low))
    return draws


def crop_windows(
    draws: NDArray[np.float64], sizes: NDArray[np.int64], ratio: tuple[float, float]
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Returns the corners (top, left) [n, 2] and the shapes (height, width) [n, 2] of random crops.

    The first of ten tries that fits into the photo is taken; where none does, the largest central window whose ratio is
    within bounds.

    Args:
        draws: rows of :func:`crop_draws`, float64 [n, COLUMNS].
        sizes: of the photos, int64 [n, 2].
        ratio: least and greatest width / height of the central window.
    """
    area = draws[:, _AREAS] * sizes.prod(axis=1, keepdims=True)
    tries = np.rint(np.sqrt(np.stack([area / draws[:, _RATIOS], area * draws[:, _RATIOS]], axis=2)))
    fits = ((tries > 0) & (tries <= sizes[:, None])).all(axis=2)
    chosen = np.take_along_axis(tries, fits.argmax(axis=1)[:, None, None], axis=1)[:, 0]
    found = fits.any(axis=1, keepdims=True)
    shapes = np.where(found, chosen, _central_shapes(sizes, ratio)).astype(np.int64)
    room = sizes - shapes
    corners = np.where(found, np.floor(draws[:, [_TOP, _LEFT]] * (room + 1)), room // 2).astype(np.int64)
    return corners, shapes


def flips(draws: NDArray[np.float64]) -> NDArray[np.int32]:
    """Returns 1 for the rows of :func:`crop_draws` that are mirrored and 0 for the others, int32 [n]."""
    return (draws[:, _FLIP] < 0.5).astype(np.int32)


def validation_windows(
    sizes: NDArray[np.int64], resize: int, image_size: int
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Returns the sizes [n, 2] that photos are scaled to, and the corners [n, 2] of their central windows.

    Args:
        sizes: of the photos, int64 [n, 2].
        resize: shorter side after scaling; the longer one is rounded down, as torchvision does.
        image_size: side of the window.
    """
    scaled = resize * sizes // sizes.min(axis=1, keepdims=True)
    return scaled, np.rint((scaled - image_size) / 2).astype(np.int64)


def _central_shapes(sizes: NDArray[np.int64], ratio: tuple[float, float]) -> NDArray[np.int64]:
    height, width = sizes[:, 0], sizes[:, 1]
    shapes = sizes.copy()
    shapes[:, 0] = np.where(width / height < ratio[0], np.rint(width / ratio[0]), height)
    shapes[:, 1] = np.where(width / height > ratio[1], np.rint(height * ratio[1]), width)
    return shapes

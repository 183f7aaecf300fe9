"""What every decoder is told, and what it gives back: encoded photos, windows, sizes and flips in, pixels out.

A decoder draws nothing and orders nothing, so the pixels of a row are the same in any batch, with any number of threads
and ranks. A window is chosen by the size in the file's header; EXIF's orientation is not obeyed, by any decoder.
"""

from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch
from numpy.typing import NDArray


@dataclass(frozen=True)
class Work:
    """V views of n photos: encoded bytes, and (height, width) pairs in pixels."""

    ids: NDArray[np.int64]
    encoded: list[NDArray[np.uint8]]
    corners: NDArray[np.int64]  # of the window that each view shows, [n, V, 2]
    shapes: NDArray[np.int64]  # of that window, [n, V, 2]
    scaled: NDArray[np.int64]  # what the windows are resized to, [n, 2]
    cuts: NDArray[np.int64]  # corner of the output in the resized windows, [n, 2]
    flips: NDArray[np.int32]  # [n, V]

    def one(self, index: int) -> "Work":
        """The same for one of the photos."""
        return Work(*(field[index : index + 1] for field in vars(self).values()))


@dataclass(frozen=True)
class Plan:
    """What a decoder is built for."""

    largest: int  # photos of a batch at most
    views: int  # outputs of a photo
    whole: bool  # whether a photo is decoded as a whole, once, and all windows are cut out of that
    side: int  # of an output, in pixels
    cubic: bool = False  # whether windows are resized by bicubic rather than bilinear interpolation


class Decoder(Protocol):
    """Decodes a window, resizes it with antialiasing, cuts the output out of it and flips that, for each view."""

    def feed(self, work: Work) -> None:
        """Starts to work on a batch, without waiting for it.

        Raises:
            Exception: of any kind; an earlier batch cannot be decoded.
        """

    def take(self) -> tuple[list[torch.Tensor], NDArray[np.int64]]:
        """Waits for the oldest batch: uint8 [n, H, W, 3] of each view, the decoder's own until the next call, and ids
        int64 [n].

        Raises:
            Exception: of any kind; a photo cannot be decoded. The decoder is not used afterwards.
        """

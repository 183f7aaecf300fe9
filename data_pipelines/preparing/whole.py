"""Whether an encoded photo is whole."""

import torch

from data_pipelines.damage import UnreadableError
from data_pipelines.decoding.with_torchvision import decoded
from data_pipelines.sources.files import measured


def whole(content: bytes) -> torch.Tensor:
    """The pixels of a photo, uint8 [3, H, W], all of which could be decoded.

    Raises:
        UnreadableError: it is no image, or damaged.
    """
    height, width = measured(content)
    try:
        pixels = decoded(content)
    except RuntimeError:
        raise UnreadableError(f"expected a whole image, found {len(content)} bytes that cannot be decoded") from None
    if tuple(pixels.shape[1:]) != (height, width):
        found = f"{pixels.shape[1]} x {pixels.shape[2]}"
        raise UnreadableError(f"expected {height} x {width} pixels by its header, found {found}")
    return pixels

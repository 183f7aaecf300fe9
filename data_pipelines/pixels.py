"""From uint8 pixels to what a network takes."""

from collections.abc import Sequence

import torch


class Normalise:
    """Turns uint8 pixels into normalised float32, the same way for every pipeline.

    Args:
        mean: per channel, of pixels scaled to [0, 1].
        std: per channel, of pixels scaled to [0, 1].
        width: width of the images, in pixels.
        device: where the images are.
    """

    def __init__(self, mean: Sequence[float], std: Sequence[float], width: int, device: torch.device) -> None:
        # One constant for each byte of a line: long lines vectorise, three channels do not (6 times slower on a CPU).
        self._mean = torch.tensor(mean, device=device).mul_(255).repeat(width)
        self._scale = torch.tensor(std, device=device).mul_(255).reciprocal_().repeat(width)

    def __call__(self, pixels: torch.Tensor) -> torch.Tensor:
        """Returns float32 [n, C, H, W] in channels-last memory, a copy of contiguous uint8 [n, H, W, C]."""
        # Two rounded operations, never one fused: the bits must not depend on where a vector register ends.
        lines = pixels.flatten(2).float().sub_(self._mean).mul_(self._scale)
        return lines.view(pixels.shape).permute(0, 3, 1, 2)

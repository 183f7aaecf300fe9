"""Operations that move or smooth pixels, each row with numbers of its own."""

import torch
from torch import Tensor

BLUR = 6
"""Pixels on each side that a blur looks at: three times its greatest sigma."""


def affine(images: Tensor, numbers: Tensor, *, bilinear: bool, fill: Tensor) -> Tensor:
    """torchvision's affine and rotate: the pixel centred at (x, y) shows what is at (a x + b y + c, d x + e y + f).

    Args:
        images: uint8 [n, C, H, W].
        numbers: a .. f of each row, float32 [n, 6 or more]; x and y in pixels from the upper left corner.
        bilinear: whether four pixels are mixed, or the nearest is taken.
        fill: what lies outside of the image, uint8 [C].
    """
    n, channels, height, width = images.shape
    a, b, c, d, e, f = (number.view(n, 1, 1) for number in numbers[:, :6].unbind(1))
    x = torch.arange(width, device=images.device, dtype=torch.float32).add_(0.5).view(1, 1, width)
    y = torch.arange(height, device=images.device, dtype=torch.float32).add_(0.5).view(1, height, 1)
    from_x, from_y = a * x + b * y + c, d * x + e * y + f
    outside = fill.view(1, channels, 1)
    flat = images.flatten(2)

    def look(column: Tensor, line: Tensor) -> Tensor:
        there = (column >= 0) & (column < width) & (line >= 0) & (line < height)
        place = line.clamp(0, height - 1).long() * width + column.clamp(0, width - 1).long()
        found = flat.gather(2, place.view(n, 1, -1).expand(-1, channels, -1))
        return torch.where(there.view(n, 1, -1), found, outside).view(images.shape)

    if not bilinear:
        return look(from_x.floor(), from_y.floor())
    from_x, from_y = from_x - 0.5, from_y - 0.5
    left, top = from_x.floor(), from_y.floor()
    right_part, low_part = (from_x - left).unsqueeze(1), (from_y - top).unsqueeze(1)
    upper = look(left, top) * (1 - right_part) + look(left + 1, top) * right_part
    lower = look(left, top + 1) * (1 - right_part) + look(left + 1, top + 1) * right_part
    return (upper * (1 - low_part) + lower * low_part).round_().clamp_(0, 255).to(torch.uint8)


def gaussian_blur(images: Tensor, numbers: Tensor) -> Tensor:
    """torchvision's gaussian_blur with a kernel of 2 BLUR + 1, mirrored at the edge.

    Args:
        images: uint8 [n, C, H, W], of more than BLUR pixels a side.
        numbers: weights of the pixels 0 .. BLUR away, float32 [n, BLUR + 1].
    """
    weights = [weight.view(-1, 1, 1, 1) for weight in numbers.unbind(1)]
    pixels = images.float()
    for dim in (2, 3):
        padded = torch.nn.functional.pad(pixels, (BLUR, BLUR, 0, 0) if dim == 3 else (0, 0, BLUR, BLUR), mode="reflect")
        size = pixels.shape[dim]
        # Pairs at the same distance are added before they are weighted: half the products.
        total = padded.narrow(dim, BLUR, size) * weights[0]
        for away in range(1, BLUR + 1):
            pair = padded.narrow(dim, BLUR - away, size) + padded.narrow(dim, BLUR + away, size)
            total = total + pair.mul_(weights[away])
        pixels = total
    return pixels.round_().clamp_(0, 255).to(torch.uint8)

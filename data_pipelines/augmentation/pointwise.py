"""Operations that change colours: those of torchvision.transforms.v2.functional, each row with a number of its own.

All take uint8 [n, C, H, W] and numbers float32 [n, WIDTH], of which each row's first counts unless said otherwise, and
return uint8 [n, C, H, W]. C is 1 or 3. Like torchvision they truncate, and sums of products may round differently by
one level. Means are taken of whole numbers: a float's sum would depend on how many rows are added up beside it.
"""

import torch
from torch import Tensor


def brightness(images: Tensor, numbers: Tensor) -> Tensor:
    """adjust_brightness: f x."""
    return _levels(images * _factor(numbers))


def contrast(images: Tensor, numbers: Tensor) -> Tensor:
    """adjust_contrast: f x + (1 - f) m, m the mean of the image's grey levels."""
    grey = _grey(images)
    total = grey.to(torch.int32).sum((1, 2, 3), dtype=torch.int64)
    mean = total.float().div_(grey[0].numel()).view(-1, 1, 1, 1)
    return _blend(images, mean, numbers)


def saturation(images: Tensor, numbers: Tensor) -> Tensor:
    """adjust_saturation: f x + (1 - f) grey(x)."""
    return images if images.shape[1] == 1 else _blend(images, _grey(images), numbers)


def sharpness(images: Tensor, numbers: Tensor) -> Tensor:
    """adjust_sharpness: f x + (1 - f) smooth(x) but at the edge; smooth is the mean of 3 x 3, the middle 5-fold."""
    pixels = images.float()
    rows = pixels[:, :, :-2] + pixels[:, :, 1:-1] + pixels[:, :, 2:]
    total = rows[..., :-2] + rows[..., 1:-1] + rows[..., 2:] + 4 * pixels[..., 1:-1, 1:-1]
    inner = pixels[..., 1:-1, 1:-1]
    step = (total.div_(13).round_() - inner) * (1 - _factor(numbers))
    pixels[..., 1:-1, 1:-1] = inner + step
    return _levels(pixels)


def hue(images: Tensor, numbers: Tensor) -> Tensor:
    """adjust_hue: the hue turned by f, a whole turn being 1."""
    if images.shape[1] == 1:
        return images
    red, green, blue = images.float().div_(255).unbind(1)
    value = torch.maximum(torch.maximum(red, green), blue)
    reach = value - torch.minimum(torch.minimum(red, green), blue)
    grey = reach == 0
    saturation = reach / torch.where(grey, 1.0, value)
    # How far each colour is below the greatest, as parts of the reach.
    reach = torch.where(grey, 1.0, reach)
    below_r, below_g, below_b = ((value - colour) / reach for colour in (red, green, blue))
    sixths = torch.where(
        value == red, below_b - below_g, torch.where(value == green, 2 + below_r - below_b, 4 + below_g - below_r)
    )
    turned = sixths / 6 + 1 + numbers[:, 0].view(-1, 1, 1)
    turned = 6 * (turned - turned.floor())
    section = turned.floor()
    along = turned - section
    section = section.to(torch.int64) % 6
    low = (1 - saturation) * value
    falling = (1 - saturation * along) * value
    rising = (1 - saturation * (1 - along)) * value
    parts = torch.stack([value, low, falling, rising], 1)
    chosen = torch.stack([_pick(section, table) for table in (0x031120, 0x112003, 0x200311)], 1)
    return parts.gather(1, chosen).mul_(256 - 1e-3).clamp_(0, 255).to(torch.uint8)


def grayscale(images: Tensor, numbers: Tensor) -> Tensor:
    """rgb_to_grayscale with as many channels as before."""
    return _grey(images).to(torch.uint8).expand_as(images)


def posterize(images: Tensor, numbers: Tensor) -> Tensor:
    """posterize: each pixel masked by f, 0 .. 255."""
    return images & numbers[:, 0].to(torch.uint8).view(-1, 1, 1, 1)


def solarize(images: Tensor, numbers: Tensor) -> Tensor:
    """solarize: pixels from f on are inverted."""
    return torch.where(images >= _factor(numbers), 255 - images, images)


def solarize_add(images: Tensor, numbers: Tensor) -> Tensor:
    """timm's SolarizeAdd: f is added to pixels below 128."""
    more = (images + _factor(numbers)).clamp_(0, 255).to(torch.uint8)
    return torch.where(images < 128, more, images)


def autocontrast(images: Tensor, numbers: Tensor) -> Tensor:
    """autocontrast: each channel stretched to 0 .. 255, where it is not all the same."""
    least = images.amin((2, 3), keepdim=True).float()
    reach = images.amax((2, 3), keepdim=True).float() - least
    flat = reach == 0
    least, scale = torch.where(flat, 0.0, least), torch.where(flat, 1.0, reach * (1 / 255))
    return _levels((images - least) / scale)


def equalize(images: Tensor, numbers: Tensor) -> Tensor:
    """equalize: each channel's levels spread so that all are about equally frequent."""
    shape = images.shape
    places = images.flatten(2).long()
    counts = torch.zeros(*shape[:2], 256, dtype=torch.int32, device=images.device)
    counts.scatter_add_(2, places, torch.ones_like(places, dtype=torch.int32))
    upto = counts.cumsum(2, dtype=torch.int32)
    # All pixels but those of the greatest level that occurs share the 255 steps.
    last = counts.gather(2, upto.argmax(2, keepdim=True))
    step = (places.shape[2] - last).div_(255, rounding_mode="floor")
    spread = (upto[..., :-1] + step // 2).div_(step.clamp(min=1), rounding_mode="floor").clamp_(0, 255)
    table = torch.cat([torch.zeros_like(spread[..., :1]), spread], 2).to(torch.uint8)
    return torch.where(step[..., None] == 0, images, table.gather(2, places).view(shape))


def invert(images: Tensor, numbers: Tensor) -> Tensor:
    """invert: 255 - x."""
    return 255 - images


def _factor(numbers: Tensor) -> Tensor:
    return numbers[:, 0].view(-1, 1, 1, 1)


def _levels(pixels: Tensor) -> Tensor:
    return pixels.clamp_(0, 255).to(torch.uint8)


def _blend(images: Tensor, other: Tensor, numbers: Tensor) -> Tensor:
    factor = _factor(numbers)
    return _levels(images * factor + other * (1 - factor))


def _grey(images: Tensor) -> Tensor:
    """Whole grey levels, float32 [n, 1, H, W]."""
    if images.shape[1] == 1:
        return images.float()
    red, green, blue = images.float().unbind(1)
    return (red * 0.2989 + green * 0.587 + blue * 0.114).floor_().unsqueeze(1)


def _pick(section: Tensor, table: int) -> Tensor:
    """The hexadecimal digit of a table, counted from its end, that stands at each section."""
    return (table >> (4 * section)) & 15

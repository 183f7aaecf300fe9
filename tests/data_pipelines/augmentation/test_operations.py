"""Each operation against torchvision's v2 functions, with the same numbers."""

import math
from collections.abc import Callable

import numpy as np
import pytest
import torch
from torch import Tensor
from torchvision.transforms import InterpolationMode
from torchvision.transforms.v2 import functional as tv

from data_pipelines.augmentation.layers import Wish, apply, layer
from tests.data_pipelines.files import photo

_SIDE = 45


def _photos(channels: int, count: int = 6) -> Tensor:
    stacked = np.stack([np.asarray(photo(seed, _SIDE, _SIDE)) for seed in range(count)])
    images = torch.from_numpy(stacked).permute(0, 3, 1, 2).contiguous()
    images[-1] = 77  # an image without any contrast
    return images[:, :channels].contiguous()


def _done(name: str, images: Tensor, magnitudes: list[float], *, bilinear: bool = False, fill: int = 0) -> Tensor:
    wish = Wish(name, np.ones(len(images), bool), np.array(magnitudes, float))
    made = layer([wish], slice(None), _SIDE)
    filling = torch.full((images.shape[1],), fill, dtype=torch.uint8)
    numbers = torch.from_numpy(made.numbers)
    return apply(images.clone(), made.parts, torch.from_numpy(made.rows), numbers, bilinear=bilinear, fill=filling)


def _differences(a: Tensor, b: Tensor) -> Tensor:
    return (a.int() - b.int()).abs()


_FACTORS = [0.0, 0.1, 0.73, 1.0, 1.37, 1.9]
_CASES: list[tuple[str, list[float], Callable[[Tensor, float], Tensor]]] = [
    ("brightness", _FACTORS, tv.adjust_brightness),
    ("contrast", _FACTORS, tv.adjust_contrast),
    ("saturation", _FACTORS, tv.adjust_saturation),
    ("sharpness", _FACTORS, tv.adjust_sharpness),
    ("hue", [-0.5, -0.2, 0.0, 0.05, 0.31, 0.5], tv.adjust_hue),
    ("posterize", [0.0, 1.0, 3.0, 4.0, 7.0, 8.0], lambda x, m: tv.posterize(x, int(m))),
    ("solarize", [0.0, 1.0, 100.5, 128.0, 200.0, 255.0], tv.solarize),
    ("autocontrast", [0.0] * 6, lambda x, _: tv.autocontrast(x)),
    ("equalize", [0.0] * 6, lambda x, _: tv.equalize(x)),
    ("invert", [0.0] * 6, lambda x, _: tv.invert(x)),
    ("grayscale", [0.0] * 6, lambda x, _: tv.rgb_to_grayscale(x, x.shape[0])),
    ("gaussian_blur", [0.1, 0.3, 0.7, 1.0, 1.6, 2.0], lambda x, m: tv.gaussian_blur(x, 23, m)),
]


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize(("name", "magnitudes", "reference"), _CASES, ids=[case[0] for case in _CASES])
def test_colours(name: str, magnitudes: list[float], reference: Callable, channels: int) -> None:
    """Within one level, for hardly any pixel; exactly where there is nothing to round."""
    images = _photos(channels)
    found = _done(name, images, magnitudes)
    expected = torch.stack([reference(image, m) for image, m in zip(images, magnitudes, strict=True)])
    differences = _differences(found, expected)
    if name in ("posterize", "solarize", "equalize", "invert", "sharpness"):
        assert differences.max() <= (name == "sharpness")
    assert differences.max() <= 1
    assert differences.float().mean() < (0.03 if name in ("gaussian_blur", "hue") else 0.01)


_SHEARS = [-0.3, 0.0, 0.1, 0.3, 0.99, -0.99]
_AFFINE: list[tuple[str, list[float], Callable[..., Tensor]]] = [
    ("shearx", _SHEARS, lambda x, m, **how: _affine(x, shear=[math.degrees(math.atan(m)), 0.0], center=[0, 0], **how)),
    ("sheary", _SHEARS, lambda x, m, **how: _affine(x, shear=[0.0, math.degrees(math.atan(m))], center=[0, 0], **how)),
    ("translatex", [-20, -1, 0, 1, 9, 44], lambda x, m, **how: _affine(x, translate=[int(m), 0], **how)),
    ("translatey", [-20, -1, 0, 1, 9, 44], lambda x, m, **how: _affine(x, translate=[0, int(m)], **how)),
    ("rotate", [-135, -30, 0, 7.3, 90, 30], lambda x, m, **how: tv.rotate(x, m, **how)),
]


def _affine(image: Tensor, **how: object) -> Tensor:
    return tv.affine(image, **{"angle": 0.0, "translate": [0, 0], "scale": 1.0, "shear": [0.0, 0.0], **how})


@pytest.mark.parametrize("bilinear", [False, True])
@pytest.mark.parametrize("fill", [0, 128])
@pytest.mark.parametrize(("name", "magnitudes", "reference"), _AFFINE, ids=[case[0] for case in _AFFINE])
def test_shapes(name: str, magnitudes: list[float], reference: Callable, bilinear: bool, fill: int) -> None:
    """The nearest pixel is another one where a place lies between two: for under 1 % of them."""
    images = _photos(3)
    mode = InterpolationMode.BILINEAR if bilinear else InterpolationMode.NEAREST
    found = _done(name, images, magnitudes, bilinear=bilinear, fill=fill)
    pairs = zip(images, magnitudes, strict=True)
    if bilinear:
        # With a fill torchvision weights pixels at the edge twice by how much of them is inside. Around 0, without one,
        # it does so once.
        moved = [reference(image.float() - fill, m, interpolation=mode) + fill for image, m in pairs]
        expected = torch.stack(moved).round().to(torch.uint8)
    else:
        expected = torch.stack([reference(image, m, interpolation=mode, fill=[float(fill)] * 3) for image, m in pairs])
    differences = _differences(found, expected)
    if bilinear:
        assert differences.max() <= 1
        assert differences.float().mean() < 0.01
    else:
        assert (differences > 0).float().mean() < 0.01


def test_solarize_add() -> None:
    images = torch.arange(256, dtype=torch.uint8).view(1, 1, 16, 16)
    found = _done("solarize_add", images, [99.0])
    assert found.flatten().tolist() == [min(255, x + 99) if x < 128 else x for x in range(256)]


def test_rows_of_many_operations_are_as_each_alone() -> None:
    names = ["brightness", "hue", "shearx", "identity", "equalize", "rotate", "gaussian_blur", "contrast", "rotate"]
    images = _photos(3, len(names))
    wishes = []
    for name in dict.fromkeys(names):
        chosen = np.array([other == name for other in names])
        wishes.append(Wish(name, chosen, np.full(len(names), 0.3)))
    black = torch.zeros(3, dtype=torch.uint8)

    def done(rows: slice) -> Tensor:
        made = layer(wishes, rows, _SIDE)
        where, numbers = torch.from_numpy(made.rows), torch.from_numpy(made.numbers)
        return apply(images[rows].clone(), made.parts, where, numbers, bilinear=True, fill=black)

    together = done(slice(0, len(names)))
    for row, name in enumerate(names):
        assert torch.equal(done(slice(row, row + 1))[0], together[row]), name
    assert torch.equal(together[3], images[3])

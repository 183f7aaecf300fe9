"""Windows against torchvision: the same rule in scalars, and the same statistics."""

import math

import numpy as np
import pytest
import torch
from torchvision.transforms import RandomResizedCrop
from torchvision.transforms import functional as tv

from data_pipelines import order
from data_pipelines.decoding import windows

_AREA, _RATIO = (0.08, 1.0), (3 / 4, 4 / 3)


def _scalar_window(row: list[float], height: int, width: int) -> tuple[int, int, int, int]:
    """RandomResizedCrop for one photo: (top, left, height, width)."""
    for area, ratio in zip(row[:10], row[10:20], strict=True):
        target = height * width * (_AREA[0] + area * (_AREA[1] - _AREA[0]))
        aspect = math.exp(math.log(_RATIO[0]) + ratio * (math.log(_RATIO[1]) - math.log(_RATIO[0])))
        w, h = round(math.sqrt(target * aspect)), round(math.sqrt(target / aspect))
        if 0 < w <= width and 0 < h <= height:
            return int(row[20] * (height - h + 1)), int(row[21] * (width - w + 1)), h, w
    w, h = width, height
    if width / height < _RATIO[0]:
        h = round(width / _RATIO[0])
    elif width / height > _RATIO[1]:
        w = round(height * _RATIO[1])
    return (height - h) // 2, (width - w) // 2, h, w


def _windows(rows: int, height: int, width: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    uniforms = order.augmentation(3, 0, 0, rows, windows.COLUMNS)
    sizes = np.tile(np.array([[height, width]]), (rows, 1))
    return uniforms, *windows.crop_windows(windows.crop_draws(uniforms, _AREA, _RATIO), sizes, _RATIO)


@pytest.mark.parametrize(("height", "width"), [(375, 500), (500, 333), (64, 64), (40, 900), (900, 40), (3, 2), (1, 1)])
def test_against_scalars(height: int, width: int) -> None:
    uniforms, corners, shapes = _windows(400, height, width)
    actual = np.concatenate([corners, shapes], axis=1).tolist()
    assert [tuple(row) for row in actual] == [_scalar_window(row, height, width) for row in uniforms.tolist()]
    assert (corners >= 0).all()
    assert (shapes > 0).all()
    assert (corners + shapes <= [height, width]).all()


@pytest.mark.parametrize(("height", "width"), [(375, 500), (200, 600)])
def test_the_statistics_of_torchvision(height: int, width: int) -> None:
    _, corners, shapes = _windows(20_000, height, width)
    ours = np.concatenate([corners, shapes], axis=1)
    torch.manual_seed(0)
    image = torch.empty(3, height, width)
    theirs = np.array([RandomResizedCrop.get_params(image, list(_AREA), list(_RATIO)) for _ in range(6_000)])
    for column in range(4):
        a, b = ours[:, column], theirs[:, column]
        assert abs(a.mean() - b.mean()) < 4 * b.std() / math.sqrt(len(b))
        np.testing.assert_allclose(np.quantile(a, [0.1, 0.5, 0.9]), np.quantile(b, [0.1, 0.5, 0.9]), rtol=0.06, atol=3)


def test_a_photo_too_long_for_any_try_gives_its_middle() -> None:
    _, corners, shapes = _windows(50, 30, 3000)
    assert np.unique(shapes, axis=0).tolist() == [[30, 40]]
    assert np.unique(corners, axis=0).tolist() == [[0, 1480]]


def test_flips_half_of_the_rows() -> None:
    draws = windows.crop_draws(order.augmentation(0, 0, 0, 10_000, windows.COLUMNS), _AREA, _RATIO)
    assert abs(windows.flips(draws).mean() - 0.5) < 0.02


@pytest.mark.parametrize(("height", "width"), [(375, 500), (500, 375), (333, 500), (256, 256), (257, 300), (1000, 37)])
def test_validation_windows_against_torchvision(height: int, width: int) -> None:
    scaled, corners = windows.validation_windows(np.array([[height, width]]), 256, 224)
    coordinates = torch.arange(height * width).view(1, height, width).float()
    resized = tv.resize(coordinates, [256], antialias=False)
    assert resized.shape[1:] == tuple(scaled[0])
    top, left = corners[0]
    assert torch.equal(tv.center_crop(resized, [224]), resized[:, top : top + 224, left : left + 224])

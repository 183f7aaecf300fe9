"""Policies: which operations, how strong and how often, against torchvision's and timm's own."""

import random
from typing import Any

import numpy as np
import pytest
from timm.data import auto_augment
from torchvision.transforms import v2

from data_pipelines import order
from data_pipelines.augmentation import policies
from data_pipelines.augmentation.layers import Layer
from data_pipelines.augmentation.sections import ColorJitterConfig, PolicyConfig

_SIDE = 96


def _layers(config: PolicyConfig, rows: int = 4000) -> list[Layer]:
    uniforms = order.uniforms("policy", 1, 0, 0, rows, policies.columns(config))
    return policies.policy_layers(config, uniforms, slice(None), _SIDE)


def _torchvision_space(transform: Any, bins: int) -> dict[str, np.ndarray]:
    space = {}
    for name, (values, signed) in transform._AUGMENTATION_SPACE.items():
        found = values(bins, _SIDE, _SIDE)
        if found is not None:
            space[name.lower()] = (np.asarray(found, float), signed)
    return space


@pytest.mark.parametrize(
    ("transform", "bins", "wide"),
    [(v2.RandAugment, 31, False), (v2.TrivialAugmentWide, 31, True), (v2.AutoAugment, 10, False)],
)
def test_magnitudes_are_torchvisions(transform: Any, bins: int, wide: bool) -> None:
    part = np.arange(bins) / (bins - 1)
    for name, (values, signed) in _torchvision_space(transform, bins).items():
        ours = {"color": "saturation"}.get(name, name)
        for negative in (False, True):
            found = policies.torchvision_magnitude(ours, part, np.full(bins, negative), _SIDE, wide=wide)
            expected = values * (-1 if negative and signed else 1)
            if name in ("brightness", "color", "contrast", "sharpness"):
                expected = 1 + expected
            elif name.startswith("translate"):
                expected = np.trunc(expected + np.sign(expected) * 1e-4)  # torchvision's 16 is 15.999999
            elif name == "solarize":
                expected = 255 * expected
            assert np.allclose(found, expected, atol=1e-5), name


@pytest.mark.parametrize("increasing", [False, True])
@pytest.mark.parametrize("level", [0.0, 3.3, 9.0, 10.0])
def test_magnitudes_are_timms(increasing: bool, level: float, monkeypatch: pytest.MonkeyPatch) -> None:
    names = auto_augment._RAND_INCREASING_TRANSFORMS if increasing else auto_augment._RAND_TRANSFORMS
    for negative in (False, True):
        monkeypatch.setattr(random, "random", lambda negative=negative: 0.9 if negative else 0.1)
        for name in names:
            make = auto_augment.LEVEL_TO_ARG[name]
            if make is None:
                continue
            (expected,) = make(level, {})
            ours = name.removesuffix("Rel").removesuffix("Increasing").lower()
            ours = {"color": "saturation", "solarizeadd": "solarize_add"}.get(ours, ours)
            if name.endswith("Rel"):
                expected *= _SIDE
            found = policies.timm_magnitude(
                ours, np.array([level / 10]), np.array([negative]), _SIDE, increasing=increasing
            )
            assert found == pytest.approx(expected), name


def test_rand_augment_takes_all_operations_equally_often() -> None:
    for layer in _layers(PolicyConfig(name="rand_augment", num_ops=3), 14_000):
        counts = dict(layer.parts)
        # Of fourteen, five are affine and one leaves the image alone.
        assert counts.pop("affine") == pytest.approx(5000, rel=0.1)
        assert len(counts) == 8
        assert all(count == pytest.approx(1000, rel=0.2) for count in counts.values())
        assert len(layer.rows) == pytest.approx(13_000, rel=0.02)
        assert len(set(layer.rows.tolist())) == len(layer.rows)


def test_timm_leaves_out_half_and_spreads_the_magnitude() -> None:
    (layer,) = _layers(PolicyConfig(name="timm_rand_augment", num_ops=1, magnitude=5.0, magnitude_std=0.5), 30_000)
    assert len(layer.rows) == pytest.approx(15_000, rel=0.03)
    counts = dict(layer.parts)
    begin = 0
    for name, count in layer.parts:
        if name == "brightness":
            factors = layer.numbers[begin : begin + count, 0]
        begin += count
    assert counts["brightness"] == pytest.approx(1000, rel=0.15)
    # 0.1 + 1.8 m / 10, m normal.
    assert factors.mean() == pytest.approx(1.0, abs=0.02)
    assert factors.std() == pytest.approx(0.09, rel=0.1)


@pytest.mark.parametrize("name", ["auto_augment_cifar10", "auto_augment_imagenet", "auto_augment_svhn"])
def test_auto_augment_has_two_steps_as_often_as_its_table_says(name: str) -> None:
    table = v2.AutoAugment(v2.AutoAugmentPolicy(name.removeprefix("auto_augment_")))._policies
    layers = _layers(PolicyConfig(name=name), 25_000)
    for at, layer in enumerate(layers):
        expected = sum(pair[at][1] for pair in table) / len(table)
        assert len(layer.rows) / 25_000 == pytest.approx(expected, abs=0.01)
        equalized = sum(pair[at][1] for pair in table if pair[at][0] == "Equalize") / len(table)
        assert dict(layer.parts)["equalize"] / 25_000 == pytest.approx(equalized, abs=0.01)


def test_three_augment_does_one_of_three() -> None:
    (layer,) = _layers(PolicyConfig(name="three_augment"), 9000)
    assert len(layer.rows) == 9000
    assert {name for name, _ in layer.parts} == {"grayscale", "solarize", "gaussian_blur"}
    assert all(count == pytest.approx(3000, rel=0.1) for _, count in layer.parts)


def test_color_jitter_does_each_operation_once_in_any_order() -> None:
    config = ColorJitterConfig(brightness=0.4, contrast=0.3, saturation=2.0, hue=0.1)
    uniforms = order.uniforms("colour", 1, 0, 0, 2400, policies.JITTER_COLUMNS)
    layers = policies.jitter_layers(config, uniforms, slice(None), _SIDE)
    seen: list[list[str]] = [[] for _ in range(2400)]
    ranges = {"brightness": (0.6, 1.4), "contrast": (0.7, 1.3), "saturation": (0.0, 3.0), "hue": (-0.1, 0.1)}
    for layer in layers:
        names = [name for name, count in layer.parts for _ in range(count)]
        for row, name, number in zip(layer.rows, names, layer.numbers[:, 0], strict=True):
            seen[row].append(name)
            low, high = ranges[name]
            assert low <= number <= high
    assert all(sorted(names) == sorted(ranges) for names in seen)
    orders = {tuple(names) for names in seen}
    assert len(orders) == 24
    some = policies.jitter_layers(ColorJitterConfig(brightness=0.4, prob=0.8), uniforms, slice(None), _SIDE)
    assert sum(len(layer.rows) for layer in some) == pytest.approx(0.8 * 2400, rel=0.05)


def test_rows_are_cut_out_of_the_global_batch() -> None:
    config = PolicyConfig(name="timm_rand_augment", magnitude_std=0.5, increasing=True)
    uniforms = order.uniforms("policy", 3, 1, 2, 32, policies.columns(config))
    for whole, part in zip(
        policies.policy_layers(config, uniforms, slice(None), _SIDE),
        policies.policy_layers(config, uniforms, slice(8, 20), _SIDE),
        strict=True,
    ):
        of_row = dict(zip(whole.rows.tolist(), whole.numbers, strict=True))
        assert {row + 8 for row in part.rows.tolist()} == {row for row in of_row if 8 <= row < 20}
        assert all((of_row[row + 8] == n).all() for row, n in zip(part.rows.tolist(), part.numbers, strict=True))

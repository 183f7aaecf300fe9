"""mixup, CutMix and smoothing: weights, boxes and targets from the equations, and against timm's own function."""

import numpy as np
import pytest
import torch
from timm.data.mixup import mixup_target

from data_pipelines import order
from data_pipelines.augmentation.mixing import (
    MIXING_COLUMNS,
    Weights,
    beta,
    mix_images,
    mix_targets,
    mixing_weights,
    partners,
    smooth,
)
from data_pipelines.augmentation.sections import MixingConfig

_UNIFORMS = np.linspace(0, 1, 2001)[:-1]


def test_beta_where_its_inverse_is_known() -> None:
    assert np.allclose(beta(_UNIFORMS, 1.0), _UNIFORMS, atol=1e-9)
    assert np.allclose(beta(_UNIFORMS, 0.5), np.sin(np.pi * _UNIFORMS / 2) ** 2, atol=1e-6)
    x = beta(_UNIFORMS, 2.0)
    assert np.allclose(3 * x**2 - 2 * x**3, _UNIFORMS, atol=1e-6)


@pytest.mark.parametrize("alpha", [0.1, 0.2, 0.8, 1.0, 4.0, 32.0])
def test_beta_has_the_mean_and_variance_of_beta(alpha: float) -> None:
    uniforms = (np.arange(400_000) + 0.5) / 400_000
    x = beta(uniforms, alpha)
    assert x.min() >= 0
    assert x.max() <= 1
    assert (np.diff(x) >= 0).all()
    assert x.mean() == pytest.approx(0.5, abs=1e-6)
    assert x.var() == pytest.approx(1 / (4 * (2 * alpha + 1)), rel=1e-4)


def _weights(config: MixingConfig, rows: int = 4000, side: int = 32, neighbours: int = 1) -> Weights:
    uniforms = order.uniforms("mixing", 1, 0, 0, rows, MIXING_COLUMNS)
    return mixing_weights(config, uniforms, slice(None), side, neighbours)


def test_modes() -> None:
    both = {"mixup_alpha": 0.8, "cutmix_alpha": 1.0}
    assert len(set(_weights(MixingConfig(**both)).own.tolist())) == 1
    pairs = _weights(MixingConfig(**both, mode="pair"))
    assert (pairs.own[::2] == pairs.own[1::2]).all()
    assert len(set(pairs.own[::2].tolist())) > 1000
    classes = _weights(MixingConfig(**both, mode="pair"), neighbours=2)
    assert (classes.own.reshape(-1, 2, 2)[:, 0] == classes.own.reshape(-1, 2, 2)[:, 1]).all()
    single = _weights(MixingConfig(**both, mode="elem"))
    assert (single.own[::2] == single.own[1::2]).mean() < 0.1


def test_how_often_which() -> None:
    config = MixingConfig(mixup_alpha=1.0, cutmix_alpha=1.0, prob=0.7, switch_prob=0.25, mode="elem")
    weights = _weights(config, 20_000)
    cut = (weights.edges[:, 1] > weights.edges[:, 0]) & (weights.edges[:, 3] > weights.edges[:, 2])
    mixed_up = weights.blended < 1
    assert not (cut & mixed_up).any()
    assert mixed_up.mean() == pytest.approx(0.7 * 0.75, abs=0.01)
    assert cut.mean() == pytest.approx(0.7 * 0.25, abs=0.02)  # boxes of less than two pixels are none


def test_a_box_weighs_what_it_covers() -> None:
    weights = _weights(MixingConfig(cutmix_alpha=1.0, mode="elem"))
    heights = weights.edges[:, 1] - weights.edges[:, 0]
    widths = weights.edges[:, 3] - weights.edges[:, 2]
    assert np.allclose(weights.own, 1 - heights * widths / 32**2)
    assert (weights.blended == 1).all()
    inner = (weights.edges[:, [0, 2]] > 0).all(1) & (weights.edges[:, [1, 3]] < 32).all(1)
    assert (heights[inner] == widths[inner]).all()
    assert (heights[inner] % 2 == 0).all()


def test_images_and_targets_are_mixed_alike() -> None:
    images = torch.arange(4.0).view(4, 1, 1, 1).expand(4, 3, 8, 8)
    targets = torch.eye(4)
    blended, own = torch.tensor([0.25, 0.25, 1.0, 1.0]), torch.tensor([0.25, 0.25, 0.5, 0.75])
    edges = torch.tensor([[0, 0, 0, 0], [0, 0, 0, 0], [0, 8, 0, 4], [2, 6, 4, 8]])
    mixed = mix_images(images, blended, edges, 1)
    assert (mixed[0] == 0.75).all()
    assert (mixed[1] == 0.25).all()
    assert (mixed[2, :, :, :4] == 3).all()
    assert (mixed[2, :, :, 4:] == 2).all()
    assert (mixed[3] == 2).sum() == 3 * 16
    assert mixed.is_contiguous(memory_format=torch.channels_last)
    expected = [[0.25, 0.75, 0, 0], [0.75, 0.25, 0, 0], [0, 0, 0.5, 0.5], [0, 0, 0.25, 0.75]]
    assert mix_targets(targets, own, 1).tolist() == expected


def test_partners_of_groups() -> None:
    assert partners(torch.arange(8), 1).tolist() == [1, 0, 3, 2, 5, 4, 7, 6]
    assert partners(torch.arange(8), 2).tolist() == [2, 3, 0, 1, 6, 7, 4, 5]


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_targets_are_timms(smoothing: float) -> None:
    classes = torch.tensor([0, 3, 1, 1])
    mine = mix_targets(smooth(classes, 5, smoothing), torch.full((4,), 0.3), 1)
    # timm's partner of row i is row n - 1 - i, of which two rows are neighbours.
    for pair in (classes[:2], classes[2:]):
        theirs = mixup_target(pair, 5, 0.3, smoothing)
        begin = 0 if pair is classes[:2] or (pair == classes[:2]).all() else 2
        assert torch.allclose(mine[begin : begin + 2], theirs)
    assert torch.allclose(mine.sum(1), torch.ones(4))

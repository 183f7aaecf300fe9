"""Deep Communication Learning's mixtures against their definition in exact rational numbers."""

from __future__ import annotations

from fractions import Fraction
from math import prod

import numpy as np
import pytest
import torch
from torch import Tensor

from losses import METHODS, Progress
from losses.dcl import DCLOptions, mix_abs, mix_abs_published, mix_mean
from tests.losses.peers import peers as alike
from tests.losses.test_dml import draw, expected_ce

K = pytest.mark.parametrize("k", [2, 3, 4, 8])
SMALLEST = 2.0**-149
"""The least positive float32."""


def definition(rows: list[Tensor], epsilon: Fraction = Fraction(0)) -> list[Fraction]:
    """sum_k m_k w_k / (sum_k m_k + epsilon) with m_k = |prod_{j != k} w_j|, element by element."""
    mixed = []
    for column in zip(*(row.tolist() for row in rows), strict=True):
        w = [Fraction(x) for x in column]
        m = [abs(prod(w[:i] + w[i + 1 :])) for i in range(len(w))]
        total = sum(m) + epsilon
        mixed.append(sum((a * b for a, b in zip(m, w, strict=True)), Fraction(0)) / total if total else Fraction(0))
    return mixed


def close(found: Tensor, expected: list[Fraction], relative: float = 1e-6) -> None:
    """Within rounding of the largest magnitude that is possible; denormals to a few of their own units."""
    assert found.dtype == torch.float32
    assert found.isfinite().all()
    for x, y in zip(found.tolist(), expected, strict=True):
        assert abs(Fraction(x) - y) <= Fraction(relative) * abs(y) + 8 * Fraction(SMALLEST), (x, float(y))


def normal(k: int, scale: float = 1.0) -> list[Tensor]:
    generator = torch.Generator().manual_seed(k)
    return [scale * torch.randn(200, generator=generator) for _ in range(k)]


@K
@pytest.mark.parametrize("scale", [1.0, 1e-3, 1e-30, 1e-38, 1e-42, 1e30])
def test_abs_of_any_signs_and_scale(k: int, scale: float) -> None:
    rows = normal(k, scale)
    close(mix_abs(rows), definition(rows))


@K
def test_abs_of_magnitudes_far_apart(k: int) -> None:
    rng = np.random.default_rng(k)
    rows = [torch.tensor(rng.normal(size=300) * 10.0 ** rng.integers(-44, 38, 300)).float() for _ in range(k)]
    close(mix_abs(rows), definition(rows))


@K
def test_abs_where_zeros_are(k: int) -> None:
    rows = [row.clone() for row in normal(k)]
    rows[0][:50] = 0
    rows[-1][25:100] = 0
    for row in rows:
        row[150:] = 0
    mixed = mix_abs(rows)
    assert torch.equal(mixed == 0, torch.tensor([x == 0 for x in definition(rows)]))
    close(mixed, definition(rows))


@K
def test_abs_of_denormals_and_of_the_largest_numbers(k: int) -> None:
    units = torch.arange(1, 65, dtype=torch.float64)
    rows = [(SMALLEST * (units + 3 * i) * (-1) ** i).float() for i in range(k)]
    assert (rows[0].abs() < torch.finfo(torch.float32).tiny).all()
    close(mix_abs(rows), definition(rows))
    largest = torch.full((4,), torch.finfo(torch.float32).max)
    close(mix_abs([largest] * k), definition([largest] * k))
    close(mix_abs([rows[0][:4], *[largest] * (k - 1)]), definition([rows[0][:4], *[largest] * (k - 1)]))


def test_two_peers_give_the_harmonic_mean_or_nothing() -> None:
    a, b = torch.tensor([2.0, -3.0, 2.0, 0.0]), torch.tensor([6.0, -6.0, -6.0, 5.0])
    torch.testing.assert_close(mix_abs([a, b]), torch.tensor([3.0, -4.0, 0.0, 0.0]))


@K
def test_published_epsilon(k: int) -> None:
    rows = normal(k, 0.05)
    epsilon = Fraction(float(np.float32(1e-18)))
    # Rounding of the sum over signs is relative to its largest part, not to what is left of it.
    expected = definition(rows, epsilon)
    for x, y, *w in zip(mix_abs_published(rows).tolist(), expected, *(r.tolist() for r in rows), strict=True):
        assert abs(Fraction(x) - y) <= 2e-6 * k * min(abs(v) for v in w)


@pytest.mark.parametrize(("k", "size"), [(2, 5e-19), (3, 5.8e-10), (4, 6.3e-7), (8, 2.0e-3)])
def test_published_epsilon_halves_weights_of_this_size(k: int, size: float) -> None:
    """The exact rule leaves equal peers as they are."""
    w = torch.tensor([size])
    np.testing.assert_allclose(mix_abs_published([w] * k), 0.5 * w, rtol=0.05)
    torch.testing.assert_close(mix_abs([w] * k), w, rtol=1e-6, atol=0)


@K
def test_mean(k: int) -> None:
    rows = normal(k)
    expected = np.mean([row.double().numpy() for row in rows], axis=0)
    np.testing.assert_allclose(mix_mean(rows), expected, rtol=1e-5, atol=1e-7)


def test_terms_are_cross_entropy_alone() -> None:
    z, y = draw(3)
    cls = METHODS["dcl"]
    method = cls(cls.Options(), alike(3, z.shape[-1]))
    signals = [{"logits": torch.tensor(x, dtype=torch.float32)} for x in z]
    terms = method([0, 2], [signals[0], {}, signals[2]], torch.tensor(y), Progress(0, 10, 1))
    assert set(terms) == {(0, "ce"), (2, "ce")}
    for k in (0, 2):
        np.testing.assert_allclose(terms[k, "ce"].item(), expected_ce(z, y, k), rtol=2e-6)


def test_what_means_nothing_is_refused() -> None:
    cls = METHODS["dcl"]
    with pytest.raises(ValueError, match=r"^dcl needs at least 2 peers to mix their parameters, found 1$"):
        cls.check(cls.Options(), 1)
    with pytest.raises(ValueError, match="epsilon = published: only combine = abs has an epsilon"):
        DCLOptions(combine="mean", epsilon="published")
    for options in ({"interval": 0}, {"beta": 1.5}, {"combine": "median"}):
        with pytest.raises(ValueError, match=next(iter(options))):
            cls.Options(**options)

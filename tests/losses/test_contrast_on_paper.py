"""The contrastive losses where their values can be worked out on paper, and where anchors have no positives."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from torch import Tensor

from losses.contrast import (
    contrast,
    kl_of_all,
    rows_in_batch,
    totals,
)
from tests.losses.contrastive import (
    along,
    gradients,
    hard,
    leaves,
    number,
    soft,
    unit_rows,
)
from tests.losses.test_contrast import CLASSES, D, N, by_size, drawn, options, plain


def paired(b: int) -> Tensor:
    """Classes of a batch of b rows, two of each."""
    return torch.arange(b) // 2


@pytest.mark.parametrize("b", [4, 8, 16])
def test_embeddings_that_are_all_the_same(b: int) -> None:
    same = unit_rows(0, D).expand(b, 1, D).float()
    expected = {"vcl": 2 * math.log(b - 1), "icl": 2 * math.log(b - 1), "soft_vcl": 0.0, "soft_icl": 0.0}
    found = plain([same, same], paired(b))
    assert found == pytest.approx(expected, rel=1e-6, abs=1e-6)
    if b == 8:
        assert found["vcl"] == pytest.approx(3.891820298, rel=1e-6)
    w = {(0, 1): torch.full((1, 1, b), 0.4), (1, 0): torch.full((1, 1, b), 0.4)}
    scaled = {name: 0.4 * x for name, x in expected.items()}
    assert plain([same, same], paired(b), w) == pytest.approx(scaled, rel=1e-6, abs=1e-6)


@pytest.mark.parametrize("tau", [0.07, 0.1, 1.0])
def test_perfect_classes(tau: float) -> None:
    y = paired(8)
    perfect = torch.eye(4, dtype=torch.float64)[y].unsqueeze(1)
    value = 2 * (math.log(math.exp(1 / tau) + 6) - 1 / tau)
    expected = {"vcl": value, "icl": value, "soft_vcl": 0.0, "soft_icl": 0.0}
    assert plain([perfect, perfect], y, tau=tau) == pytest.approx(expected, rel=1e-9, abs=1e-12)
    if tau == 0.1:
        assert value == pytest.approx(5.447e-4, rel=1e-4)
        assert plain([perfect.float()] * 2, y)["vcl"] == pytest.approx(value, abs=2e-6)


def test_direction_and_factor_of_the_kl() -> None:
    """Student (3, 0), teacher (0, 0), T = 3."""
    student, teacher = torch.tensor([3.0, 0.0]), torch.tensor([0.0, 0.0])
    logs = [(x / 3).log_softmax(0).view(1, 1, 2) for x in (teacher, student)]
    assert 9 * kl_of_all(*logs).item() == pytest.approx(1.0810305626, rel=1e-6)
    assert soft(student.double(), teacher.double(), 3).item() == pytest.approx(1.0810305626, rel=1e-9)


@pytest.mark.parametrize("difference", [1e-3, 1e-2])
def test_small_divergences_keep_their_digits(difference: float) -> None:
    """Of peers that nearly agree: a KL of 1e-6, where two sums of 6 that are subtracted in float32 leave no digit."""
    rng = np.random.default_rng(0)
    base = rng.normal(size=(1, 4, 500))
    teacher, student = (torch.tensor(base + difference * rng.normal(size=(s, 4, 500))).float() for s in (2, 3))
    log_q, log_p = teacher.log_softmax(-1), student.log_softmax(-1)
    exact = (log_q.double().exp() * (log_q.double() - log_p.double().unsqueeze(1))).sum(-1)
    assert (exact < 1.5 * difference**2).all()
    np.testing.assert_allclose(kl_of_all(log_q, log_p), exact, rtol=3e-4)


# -- anchors without positives ----------------------------------------------------------------------------------------


def test_anchors_without_positives_count_0() -> None:
    """One of 6 rows: the others' losses are divided by 6 all the same; its gradient as an anchor is 0."""
    z = torch.tensor(np.random.default_rng(0).normal(size=(3, N, N)), requires_grad=True)
    y = CLASSES[:N]
    found = contrast(z, y)
    for s in range(3):
        for n in range(N):
            others = [g for g in range(N) if g != n]
            right = hard(z[s, n], [g for g in others if y[g] == y[n]], others)
            np.testing.assert_allclose(found[s, n].item(), number(right), rtol=1e-12)
    assert (found[:, 3] == 0).all()
    (gradient,) = torch.autograd.grad(found.sum(), z)
    assert not gradient[:, 3].any()
    assert gradient[:, [0, 1, 2, 4, 5]].abs().sum((0, 2)).all()
    assert not gradient[:, range(N), range(N)].any()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("n", [1, 2, 5])
def test_no_anchor_with_a_positive(n: int, dtype: torch.dtype) -> None:
    live = leaves(drawn((2, 1), n), dtype)
    o = options()
    terms = totals(rows_in_batch([0, 1], by_size(live), by_size(live), torch.arange(n), o), {}, o)
    for i in (0, 1):
        for name in ("vcl", "icl"):
            assert terms[i, name].item() == 0
            assert not any(g.any() for g in gradients(terms[i, name], live))
    total = torch.stack(list(terms.values())).sum()
    assert torch.isfinite(total)
    assert all(torch.isfinite(g).all() for g in (*gradients(total, live), *along(total, live)))

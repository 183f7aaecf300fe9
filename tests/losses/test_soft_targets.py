"""Targets that are probabilities, and the binary cross-entropy."""

from __future__ import annotations

import itertools
from functools import partial
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from timm.loss import BinaryCrossEntropy

from losses import METHODS
from losses.functional import binary_cross_entropy, classifier, cross_entropy
from losses.kdcl import KDCL, KDCLOptions, best_mixture
from tests.losses.double import at_epoch, draw
from tests.losses.peers import peers

C = 7


def _soft(seed: int, rows: int = 6) -> torch.Tensor:
    rng = np.random.default_rng(seed)
    return torch.tensor(rng.dirichlet(np.full(C, 0.3), rows))


def test_cross_entropy_of_probabilities() -> None:
    (signals,), classes = draw(1, logits=(C,))
    z, y = signals["logits"], _soft(1)
    expected = 0.0
    for n, c in itertools.product(range(6), range(C)):
        expected -= float(y[n, c]) * float(z[n, c] - torch.logsumexp(z[n], 0)) / 6
    assert cross_entropy(z.float(), y.float()).item() == pytest.approx(expected, rel=1e-6)
    one_hot = F.one_hot(classes, C).float()
    assert cross_entropy(z.float(), one_hot).item() == pytest.approx(cross_entropy(z.float(), classes).item(), rel=1e-6)


@pytest.mark.parametrize("threshold", [None, 0.2])
@pytest.mark.parametrize("sum_classes", [False, True])
def test_binary_cross_entropy_is_timms(threshold: float | None, sum_classes: bool) -> None:
    (signals,), classes = draw(1, logits=(C,))
    z = signals["logits"].float()
    theirs = BinaryCrossEntropy(smoothing=0.0, target_threshold=threshold, sum_classes=sum_classes)
    ours = classifier("binary_cross_entropy", threshold=threshold, sum_classes=sum_classes)
    for y in (classes, _soft(2).float()):
        assert ours(z, y).item() == pytest.approx(theirs(z, y).item(), rel=1e-6)


def test_a_logit_of_zero_costs_ln_2() -> None:
    assert binary_cross_entropy(torch.zeros(3, C), torch.tensor([0, 1, 2])).item() == pytest.approx(np.log(2))


def _methods() -> list[tuple[str, dict[str, Any]]]:
    return [("independent", {}), ("dml", {}), ("dml", {"combine": "ensemble"}), ("dcl", {}), ("cl_ilr", {})]


@pytest.mark.parametrize(("name", "options"), _methods())
def test_one_hot_targets_are_classes(name: str, options: dict[str, Any]) -> None:
    method = METHODS[name](METHODS[name].Options(**options), peers(2, C))
    signals, classes = draw(2, logits=(C,))
    floats = [{key: x.float() for key, x in peer.items()} for peer in signals]
    hard = method([0, 1], floats, classes, at_epoch(3))
    soft = method([0, 1], floats, F.one_hot(classes, C).float(), at_epoch(3))
    assert hard.keys() == soft.keys()
    for key, term in hard.items():
        assert soft[key].item() == pytest.approx(term.item(), rel=1e-6)


def test_a_method_holds_logits_against_targets_as_the_run_says() -> None:
    method = METHODS["dml"](METHODS["dml"].Options(), peers(2, C))
    method.classify = partial(binary_cross_entropy, threshold=0.1)
    signals, _ = draw(2, logits=(C,))
    floats = [{key: x.float() for key, x in peer.items()} for peer in signals]
    y = _soft(4).float()
    terms = method([0, 1], floats, y, at_epoch(0))
    for k in (0, 1):
        z, t = signals[k]["logits"], (y > 0.1).double()
        expected = -(t * torch.sigmoid(z).log() + (1 - t) * torch.sigmoid(-z).log()).mean()
        assert terms[k, "ce"].item() == pytest.approx(expected.item(), rel=1e-6)


# -- KDCL, whose ensembles look at targets ----------------------------------------------------------------------------


def test_who_needs_classes() -> None:
    refused = {name for name, method in METHODS.items() if method.needs_classes(method.Options())}
    assert refused == {"mcl", "lmcl", "kdcl"}
    assert not any(KDCL.needs_classes(KDCLOptions(ensemble=e)) for e in ("naive", "linear", "mean", "general"))


def test_naive_takes_the_peer_with_the_least_cross_entropy() -> None:
    signals, _ = draw(3, logits=(C,))
    z, y = [peer["logits"] for peer in signals], _soft(5)
    method = KDCL(KDCLOptions(ensemble="naive", temperature=1.0), peers(3, C))
    terms = method(range(3), [{"logits": x.float()} for x in z], y.float(), at_epoch(0))
    cost = [[-(y[n] * x[n].log_softmax(0)).sum().item() for x in z] for n in range(6)]
    teacher = torch.stack([z[int(np.argmin(cost[n]))][n] for n in range(6)])
    for k in range(3):
        expected = F.kl_div(z[k].log_softmax(1), teacher.softmax(1), reduction="batchmean").item()
        assert terms[k, "kd"].item() == pytest.approx(expected, rel=1e-5, abs=1e-6)


def test_linear_is_no_worse_than_any_mixture_of_a_grid() -> None:
    signals, _ = draw(3, logits=(C,))
    z, y = torch.stack([peer["logits"] for peer in signals]), _soft(6)
    a = best_mixture(z, y)
    assert torch.allclose(a.sum(0), torch.ones(6, dtype=torch.float64))

    def cost(weights: torch.Tensor) -> torch.Tensor:
        mixed = torch.einsum("kn,knc->nc", weights, z)
        return -(y * mixed.log_softmax(1)).sum(1)

    least = cost(a)
    for i, j in itertools.product(range(21), range(21)):
        if i + j <= 20:
            grid = torch.tensor([i / 20, j / 20, 1 - (i + j) / 20], dtype=torch.float64)[:, None].expand(3, 6)
            assert (least <= cost(grid) + 1e-6).all()

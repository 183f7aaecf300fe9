"""CL-ILR against its equations in float64, in the paper's form and in that of OKDDip's code."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch

from losses import METHODS, Terms
from tests.losses.double import Leaves, assert_agrees, at_epoch, ce, draw, kd, reached, softmax
from tests.losses.peers import peers as alike

OKDDIP: dict[str, Any] = {
    "beta": None,
    "temperature": 3.0,
    "times_t_squared": True,
    "ramp_up_epochs": 80,
    "teacher": "attached",
}


def cl_ilr(peers: int, **options: Any):
    cls = METHODS["cl_ilr"]
    return cls(cls.Options(**options), alike(peers, 7))


def mean_of_others(signals: Leaves, k: int) -> torch.Tensor:
    return sum(s["logits"] for j, s in enumerate(signals) if j != k) / (len(signals) - 1)


@pytest.mark.parametrize("epoch", [0, 100])
@pytest.mark.parametrize("peers", [2, 4])
def test_the_papers_form(peers: int, epoch: int) -> None:
    signals, y = draw(peers, logits=(7,))

    def reference(signals: Leaves, _: Any, y: torch.Tensor) -> Terms:
        terms: Terms = {}
        for k, peer in enumerate(signals):
            terms[k, "ce"] = 0.5 * ce(peer["logits"], y)
            terms[k, "kl"] = 0.5 * kd(peer["logits"], mean_of_others(signals, k).detach(), 2.0) / 4
        return terms

    assert_agrees(cl_ilr(peers), signals, y, epoch, reference)


def test_its_kl_has_the_gradient_of_the_papers_soft_cross_entropy() -> None:
    signals, y = draw(3, logits=(7,))
    z = [peer["logits"].requires_grad_() for peer in signals]
    soft = -0.7 * (softmax(mean_of_others(signals, 1).detach() / 2) * softmax(z[1] / 2).log()).sum() / len(y)
    (expected,) = torch.autograd.grad(soft, z[1])
    own = [{"logits": x.detach().float().requires_grad_()} for x in z]
    cl_ilr(3, beta=0.3)(range(3), own, y, at_epoch(0))[1, "kl"].backward()
    torch.testing.assert_close(own[1]["logits"].grad.double(), expected, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("epoch", [0, 20, 100])
@pytest.mark.parametrize("peers", [2, 4])
def test_the_form_of_okddips_code(peers: int, epoch: int) -> None:
    signals, y = draw(peers, logits=(7,))
    weight = {0: math.exp(-5), 20: math.exp(-5 * 0.75**2), 100: 1.0}[epoch]

    def reference(signals: Leaves, _: Any, y: torch.Tensor) -> Terms:
        terms: Terms = {(k, "ce"): ce(peer["logits"], y) for k, peer in enumerate(signals)}
        terms[None, "kl"] = weight * sum(
            kd(peer["logits"], mean_of_others(signals, k)) for k, peer in enumerate(signals)
        )
        return terms

    assert_agrees(cl_ilr(peers, **OKDDIP), signals, y, epoch, reference)


def test_where_gradients_stop() -> None:
    signals, y = draw(3, logits=(7,))
    assert reached(cl_ilr(3), signals, y, (1, "kl")) == {"1/logits"}
    assert reached(cl_ilr(3, **OKDDIP), signals, y, (None, "kl")) == {"0/logits", "1/logits", "2/logits"}


def test_what_is_shared() -> None:
    cls = METHODS["cl_ilr"]
    assert cls.trunk_gradient == "mean"
    assert [cls.trunk(cls.Options(), stages) for stages in (3, 4, 5)] == [2, 3, 4]
    assert not list(cl_ilr(4).parameters())


def test_one_peer_is_refused() -> None:
    cls = METHODS["cl_ilr"]
    with pytest.raises(ValueError, match=r"^cl_ilr needs at least 2 peers to teach each other, found 1$"):
        cls.check(cls.Options(), 1)


@pytest.mark.parametrize(
    "options", [{"beta": 1.5}, {"temperature": 0.0}, {"ramp_up_epochs": -1}, {"teacher": "ema"}, {"alpha": 1.0}]
)
def test_options_that_mean_nothing_are_refused(options: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=next(iter(options))):
        METHODS["cl_ilr"].Options(**options)

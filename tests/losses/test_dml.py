"""Deep Mutual Learning against its equations, written out as float64 loops over rows, classes and peers."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch

from losses import METHODS, Progress
from tests.losses.peers import peers as alike

PROGRESS = Progress(step=3, steps_per_epoch=10, epochs=2)
N, C = 6, 7


def dml(peers: int, **options: Any):
    cls = METHODS["dml"]
    return cls(cls.Options(**options), alike(peers, C))


def draw(peers: int, std: float = 2.0, n: int = N, c: int = C, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Logits [K, n, c], the same numbers in float32 and float64, and classes [n]."""
    rng = np.random.default_rng(seed)
    return (std * rng.normal(size=(peers, n, c))).astype(np.float32).astype(np.float64), rng.integers(c, size=n)


def terms_of(method: Any, z: np.ndarray, y: np.ndarray, residents: Any = None) -> tuple[dict, list[torch.Tensor]]:
    logits = [torch.tensor(x, dtype=torch.float32, requires_grad=True) for x in z]
    residents = range(len(z)) if residents is None else residents
    return method(residents, [{"logits": x} for x in logits], torch.tensor(y), PROGRESS), logits


def log_softmax(row: np.ndarray, t: float = 1.0) -> list[float]:
    scaled = [float(v) / t for v in row]
    top = max(scaled)
    total = top + math.log(sum(math.exp(v - top) for v in scaled))
    return [v - total for v in scaled]


def kl(target: list[float], own: list[float]) -> float:
    """KL(exp target || exp own) of two rows of log probabilities."""
    return sum(math.exp(a) * (a - b) for a, b in zip(target, own, strict=True))


def expected_ce(z: np.ndarray, y: np.ndarray, k: int) -> float:
    return sum(-log_softmax(z[k, n])[y[n]] for n in range(len(y))) / len(y)


def expected_kl(z: np.ndarray, k: int, combine: str, t: float, weight: float) -> float:
    """weight T^2 times: sum or mean over j != k of KL(p_j || p_k), or KL(mean of p_j || p_k); the mean over rows."""
    total, others = 0.0, [j for j in range(len(z)) if j != k]
    for n in range(z.shape[1]):
        own = log_softmax(z[k, n], t)
        theirs = [log_softmax(z[j, n], t) for j in others]
        if combine == "ensemble":
            total += kl([math.log(sum(math.exp(p[c]) for p in theirs) / len(others)) for c in range(len(own))], own)
        else:
            total += sum(kl(p, own) for p in theirs) / (len(others) if combine == "mean" else 1)
    return weight * t * t * total / z.shape[1]


@pytest.mark.parametrize("t", [1.0, 3.0])
@pytest.mark.parametrize("combine", ["mean", "sum", "ensemble"])
@pytest.mark.parametrize("peers", [2, 3, 4])
def test_values(peers: int, combine: str, t: float) -> None:
    z, y = draw(peers)
    terms, _ = terms_of(dml(peers, combine=combine, temperature=t, weight=0.7), z, y)
    assert set(terms) == {(k, name) for k in range(peers) for name in ("ce", "kl")}
    for k in range(peers):
        np.testing.assert_allclose(terms[k, "ce"].item(), expected_ce(z, y, k), rtol=2e-6)
        np.testing.assert_allclose(terms[k, "kl"].item(), expected_kl(z, k, combine, t, 0.7), rtol=2e-6)


def test_defaults_are_the_papers() -> None:
    z, y = draw(3)
    terms, _ = terms_of(dml(3), z, y)
    for k in range(3):
        np.testing.assert_allclose(terms[k, "kl"].item(), expected_kl(z, k, "mean", 1.0, 1.0), rtol=2e-6)


def closed_form(z: np.ndarray, y: np.ndarray, k: int, factor: float, t: float) -> np.ndarray:
    """(p_k - y + factor T (p_k^T - mean_{j != k} p_j^T)) / N, by rows."""
    gradient = np.zeros(z.shape[1:])
    for n in range(z.shape[1]):
        own, own_t = np.exp(log_softmax(z[k, n])), np.exp(log_softmax(z[k, n], t))
        q = np.mean([np.exp(log_softmax(z[j, n], t)) for j in range(len(z)) if j != k], axis=0)
        gradient[n] = own - np.eye(z.shape[2])[y[n]] + factor * t * (own_t - q)
    return gradient / z.shape[1]


def objective_float64(z: np.ndarray, y: np.ndarray, combine: str, t: float, weight: float) -> list[torch.Tensor]:
    """Gradients of L_k with respect to z_k from the equation as it stands in the paper, by torch in float64."""
    gradients = []
    for k in range(len(z)):
        own = torch.tensor(z[k], requires_grad=True)
        theirs = [torch.tensor(x).div(t).softmax(-1) for j, x in enumerate(z) if j != k]
        log_p = own.div(t).log_softmax(-1)
        if combine == "ensemble":
            theirs = [torch.stack(theirs).mean(0)]
        each = [(p * (p.log() - log_p)).sum(-1).mean() for p in theirs]
        divergence = sum(each) if combine == "sum" else sum(each) / len(each)
        ce = -own.log_softmax(-1)[torch.arange(len(y)), torch.tensor(y)].mean()
        gradients += torch.autograd.grad(ce + weight * t**2 * divergence, own)
    return gradients


@pytest.mark.parametrize("t", [1.0, 3.0])
@pytest.mark.parametrize("combine", ["mean", "sum", "ensemble"])
@pytest.mark.parametrize("peers", [2, 3, 4])
def test_gradient_of_the_own_logits(peers: int, combine: str, t: float) -> None:
    z, y = draw(peers, seed=1)
    terms, logits = terms_of(dml(peers, combine=combine, temperature=t, weight=0.7), z, y)
    torch.stack(list(terms.values())).sum().backward()
    factor = 0.7 * (peers - 1 if combine == "sum" else 1)
    derived = objective_float64(z, y, combine, t, 0.7)
    for k in range(peers):
        by_hand = closed_form(z, y, k, factor, t)
        np.testing.assert_allclose(derived[k].numpy(), by_hand, rtol=1e-9, atol=1e-14)
        # float32 inside: relative to the largest entry, since entries cancel.
        np.testing.assert_allclose(logits[k].grad, by_hand, rtol=1e-6, atol=1e-6 * np.abs(by_hand).max())


@pytest.mark.parametrize("combine", ["mean", "sum", "ensemble"])
def test_targets_are_constant_even_where_all_peers_live(combine: str) -> None:
    z, y = draw(3)
    for k in range(3):
        terms, logits = terms_of(dml(3, combine=combine), z, y)
        terms[k, "kl"].backward()
        assert [x.grad is not None for x in logits] == [j == k for j in range(3)]


def test_ensemble_has_the_gradient_of_mean_and_a_smaller_value() -> None:
    z, y = draw(4)
    gradients, values = {}, {}
    for combine in ("mean", "ensemble"):
        terms, logits = terms_of(dml(4, combine=combine, temperature=2.0), z, y)
        torch.stack(list(terms.values())).sum().backward()
        gradients[combine] = torch.stack([x.grad for x in logits])
        values[combine] = sum(term.item() for (_, name), term in terms.items() if name == "kl")
    torch.testing.assert_close(gradients["mean"], gradients["ensemble"], rtol=1e-6, atol=1e-8)
    assert values["ensemble"] < 0.95 * values["mean"]


@pytest.mark.parametrize("combine", ["mean", "sum", "ensemble"])
def test_saturated_logits_stay_finite_and_exact(combine: str) -> None:
    """Standard deviation 30 over 1000 classes: most probabilities are zero in float32, the logarithms are not."""
    z, y = draw(3, std=30.0, n=4, c=1000)
    terms, logits = terms_of(dml(3, combine=combine), z, y)
    torch.stack(list(terms.values())).sum().backward()
    factor = 2.0 if combine == "sum" else 1.0
    for k in range(3):
        # The loop's mean of probabilities underflows to log 0 where every peer's is 0; the closed value is finite.
        if combine != "ensemble":
            np.testing.assert_allclose(terms[k, "kl"].item(), expected_kl(z, k, combine, 1.0, 1.0), rtol=1e-5)
        else:
            np.testing.assert_allclose(terms[k, "kl"].item(), saturated_ensemble(z, k), rtol=1e-5)
        by_hand = closed_form(z, y, k, factor, 1.0)
        np.testing.assert_allclose(logits[k].grad, by_hand, rtol=1e-4, atol=1e-5 * np.abs(by_hand).max())


def saturated_ensemble(z: np.ndarray, k: int) -> float:
    total = 0.0
    for n in range(z.shape[1]):
        own = log_softmax(z[k, n])
        q = np.mean([np.exp(log_softmax(z[j, n])) for j in range(len(z)) if j != k], axis=0)
        total += sum(v * (math.log(v) - w) for v, w in zip(q, own, strict=True) if v > 0)
    return total / z.shape[1]


@pytest.mark.parametrize("combine", ["mean", "sum", "ensemble"])
def test_equal_peers_have_nothing_to_teach(combine: str) -> None:
    z, y = draw(1)
    terms, logits = terms_of(dml(3, combine=combine, weight=5.0), np.repeat(z, 3, axis=0), y)
    torch.stack([term for (_, name), term in terms.items() if name == "kl"]).sum().backward()
    for k in range(3):
        assert abs(terms[k, "kl"].item()) < 5e-6
        assert float(logits[k].grad.abs().max()) < 1e-6


def test_weight_zero_leaves_the_gradient_of_cross_entropy() -> None:
    z, y = draw(2)
    terms, logits = terms_of(dml(2, weight=0.0), z, y)
    torch.stack(list(terms.values())).sum().backward()
    by_hand = closed_form(z, y, 1, 0.0, 1.0)
    np.testing.assert_allclose(logits[1].grad, by_hand, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("residents", [[0], [2], [1, 3]])
def test_residents_get_exactly_their_own_terms_of_the_whole(residents: list[int]) -> None:
    z, y = draw(4)
    whole, _ = terms_of(dml(4, combine="sum", temperature=2.0), z, y)
    part, _ = terms_of(dml(4, combine="sum", temperature=2.0), z, y, residents)
    assert {key: v.item() for key, v in part.items()} == {
        key: v.item() for key, v in whole.items() if key[0] in residents
    }


def test_logits_in_half_precision_are_computed_in_float32() -> None:
    z, y = draw(2)
    half = [torch.tensor(x).bfloat16() for x in z]
    terms = dml(2)([0, 1], [{"logits": x} for x in half], torch.tensor(y), PROGRESS)
    assert all(term.dtype == torch.float32 for term in terms.values())
    rounded = np.stack([x.double().numpy() for x in half])
    np.testing.assert_allclose(terms[0, "kl"].item(), expected_kl(rounded, 0, "mean", 1.0, 1.0), rtol=2e-6)


def test_one_peer_is_refused() -> None:
    cls = METHODS["dml"]
    with pytest.raises(ValueError, match=r"^dml needs at least 2 peers to teach each other, found 1$"):
        cls.check(cls.Options(), 1)
    cls.check(cls.Options(), 2)


def test_turns() -> None:
    cls = METHODS["dml"]
    assert [list(turn) for turn in cls.turns(cls.Options(), 3)] == [[0, 1, 2]]
    assert [list(turn) for turn in cls.turns(cls.Options(order="sequential"), 3)] == [[0], [1], [2]]


@pytest.mark.parametrize(
    "options", [{"temperature": 0.0}, {"weight": -1.0}, {"combine": "median"}, {"order": "random"}, {"tau": 1.0}]
)
def test_options_that_mean_nothing_are_refused(options: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=next(iter(options))):
        METHODS["dml"].Options(**options)


# -- weights and a ramp -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("ramp", "factor"), [(0, 1.0), (4, math.exp(-5))])
def test_weights_for_each_direction_and_a_ramp(ramp: int, factor: float) -> None:
    """L_k = CE + weight T^2 exp(-5 (1 - e/ramp)^2) sum_j w_kj KL(p_j || p_k); this is epoch 0."""
    z, y = draw(3)
    weights, t = [[0.0, 0.5, 2.0], [0.0, 0.0, 1.0], [0.0, 0.0, 0.0]], 2.0
    method = dml(3, weights=weights, temperature=t, weight=0.7, ramp=ramp)
    terms, logits = terms_of(method, z, y)
    for k in range(3):
        pairs = [
            weights[k][j] * kl(log_softmax(z[j, n], t), log_softmax(z[k, n], t)) for j in range(3) for n in range(N)
        ]
        expected = factor * 0.7 * t**2 * sum(pairs) / N
        assert terms[k, "kl"].item() == pytest.approx(expected, rel=1e-4, abs=1e-6)
        assert terms[k, "ce"].item() == pytest.approx(expected_ce(z, y, k), rel=1e-5)
    # Who teaches gets no gradient from it: peer 2 learns from the labels alone.
    sum(terms.values()).backward()
    alone = torch.tensor(z[2], dtype=torch.float32, requires_grad=True)
    torch.nn.functional.cross_entropy(alone, torch.tensor(y)).backward()
    torch.testing.assert_close(logits[2].grad, alone.grad)


def test_equal_weights_are_the_mean() -> None:
    z, y = draw(3)
    half = [[0.0 if j == k else 0.5 for j in range(3)] for k in range(3)]
    weighted, _ = terms_of(dml(3, weights=half), z, y)
    plain, _ = terms_of(dml(3), z, y)
    for key, term in plain.items():
        torch.testing.assert_close(weighted[key], term)


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"weights": [[0.0, 1.0]]}, "expected 2 rows of 2 numbers"),
        ({"weights": [[1.0, 1.0], [1.0, 0.0]]}, "0 on the diagonal"),
        ({"weights": [[0.0, -1.0], [1.0, 0.0]]}, "expected numbers from 0"),
        ({"weights": [[0.0, 1.0], [1.0, 0.0]], "combine": "sum"}, "combine = sum: weights say how"),
    ],
)
def test_weights_that_do_not_fit_are_refused(options: dict[str, Any], reason: str) -> None:
    cls = METHODS["dml"]
    with pytest.raises(ValueError, match=reason):
        cls.check(cls.Options(**options), 2)

"""KDCL against its equations, written out as float64 loops over rows, classes and peers."""

from __future__ import annotations

import itertools
import math
from typing import Any

import numpy as np
import pytest
import torch

from losses import METHODS, Progress
from losses.kdcl import KDCL, KDCLOptions, best_mixture
from tests.losses.peers import peers as alike
from tests.losses.test_dml import draw, expected_ce, kl, log_softmax

PROGRESS = Progress(step=3, steps_per_epoch=10, epochs=2)
N, C = 6, 7


def kdcl(peers: int, **options: Any) -> KDCL:
    return KDCL(KDCLOptions(**options), alike(peers, C))


def terms_of(method: KDCL, z: np.ndarray, y: np.ndarray, residents: Any = None) -> tuple[dict, list[torch.Tensor]]:
    logits = [torch.tensor(x, dtype=torch.float32, requires_grad=True) for x in z]
    residents = range(len(z)) if residents is None else residents
    return method(residents, [{"logits": x} for x in logits], torch.tensor(y), PROGRESS), logits


def entropy(row: np.ndarray, c: int) -> float:
    return -log_softmax(row)[c]


def naive(z: np.ndarray, y: np.ndarray) -> np.ndarray:
    target = np.empty(z.shape[1:])
    for n, c in enumerate(y):
        target[n] = min((z[i, n] for i in range(len(z))), key=lambda row: entropy(row, c))
    return target


def minlogit(z: np.ndarray, y: np.ndarray) -> np.ndarray:
    target = np.empty(z.shape[1:])
    for n, c in enumerate(y):
        for j in range(z.shape[2]):
            target[n, j] = min(z[i, n, j] - z[i, n, c] for i in range(len(z)))
    return target


def mean(z: np.ndarray, y: np.ndarray) -> np.ndarray:
    target = np.zeros(z.shape[1:])
    for i in range(len(z)):
        target += z[i] / len(z)
    return target


TARGETS = {"naive": naive, "minlogit": minlogit, "mean": mean}


def expected_kd(z: np.ndarray, target: np.ndarray, k: int, t: float) -> float:
    rows = range(z.shape[1])
    return t * t * sum(kl(log_softmax(target[n], t), log_softmax(z[k, n], t)) for n in rows) / len(rows)


@pytest.mark.parametrize("t", [1.0, 2.0, 4.0])
@pytest.mark.parametrize("ensemble", TARGETS)
@pytest.mark.parametrize("peers", [2, 3, 4])
def test_values(peers: int, ensemble: str, t: float) -> None:
    z, y = draw(peers)
    terms, _ = terms_of(kdcl(peers, ensemble=ensemble, temperature=t, weight=0.7, ce_weight=0.4), z, y)
    assert set(terms) == {(k, name) for k in range(peers) for name in ("ce", "kd")}
    for k in range(peers):
        np.testing.assert_allclose(terms[k, "ce"].item(), 0.4 * expected_ce(z, y, k), rtol=2e-6)
        expected = 0.7 * expected_kd(z, TARGETS[ensemble](z, y), k, t)
        np.testing.assert_allclose(terms[k, "kd"].item(), expected, rtol=3e-6)


def test_defaults_are_minlogit_at_temperature_2_with_both_weights_1() -> None:
    z, y = draw(3)
    terms, _ = terms_of(kdcl(3), z, y)
    for k in range(3):
        np.testing.assert_allclose(terms[k, "ce"].item(), expected_ce(z, y, k), rtol=2e-6)
        np.testing.assert_allclose(terms[k, "kd"].item(), expected_kd(z, minlogit(z, y), k, 2.0), rtol=3e-6)


@pytest.mark.parametrize("ensemble", TARGETS)
def test_gradient_of_the_own_logits(ensemble: str) -> None:
    """(a (softmax(z) - y) + b T (softmax(z / T) - softmax(z_t / T))) / N, since z_t is constant."""
    z, y = draw(3, seed=1)
    terms, logits = terms_of(kdcl(3, ensemble=ensemble, temperature=3.0, weight=0.7, ce_weight=0.4), z, y)
    torch.stack(list(terms.values())).sum().backward()
    target = TARGETS[ensemble](z, y)
    for k in range(3):
        by_hand = np.zeros((N, C))
        for n in range(N):
            own, own_t = np.exp(log_softmax(z[k, n])), np.exp(log_softmax(z[k, n], 3.0))
            by_hand[n] = 0.4 * (own - np.eye(C)[y[n]]) + 0.7 * 3 * (own_t - np.exp(log_softmax(target[n], 3.0)))
        np.testing.assert_allclose(logits[k].grad, by_hand / N, rtol=1e-5, atol=1e-6 * np.abs(by_hand / N).max())


@pytest.mark.parametrize("ensemble", ["naive", "linear", "minlogit", "general", "mean"])
def test_targets_are_constant_even_where_all_peers_live(ensemble: str) -> None:
    z, y = draw(3)
    for k in range(3):
        terms, logits = terms_of(kdcl(3, ensemble=ensemble), z, y)
        terms[k, "kd"].backward()
        assert [x.grad is not None for x in logits] == [j == k for j in range(3)]


@pytest.mark.parametrize("ensemble", ["naive", "linear", "minlogit", "general", "mean"])
def test_residents_get_exactly_their_own_terms_of_the_whole(ensemble: str) -> None:
    z, y = draw(4)
    whole, _ = terms_of(kdcl(4, ensemble=ensemble), z, y)
    part, _ = terms_of(kdcl(4, ensemble=ensemble), z, y, [1, 3])
    assert part == {key: v for key, v in whole.items() if key[0] in (1, 3)}


@pytest.mark.parametrize("std", [0.3, 2.0, 20.0])
def test_minlogit_is_at_least_as_good_as_every_peer_on_every_image(std: float) -> None:
    z, y = draw(4, std=std, n=50)
    target = kdcl(4)._ensemble(torch.tensor(z), torch.tensor(y)).numpy()
    for n, c in enumerate(y):
        assert target[n, c] == 0
        assert entropy(target[n], c) <= min(entropy(z[i, n], c) for i in range(4)) + 1e-12


# -- linear -----------------------------------------------------------------------------------------------------------


def mixed(z: np.ndarray, a: Any, n: int, c: int) -> float:
    return entropy(sum(weight * z[i, n] for i, weight in enumerate(a)), c)


@pytest.mark.parametrize("std", [0.3, 2.0, 10.0])
def test_mixture_of_two_against_a_fine_grid(std: float) -> None:
    z, y = draw(2, std=std, n=8, c=5)
    found = best_mixture(torch.tensor(z), torch.tensor(y)).numpy()
    for n, c in enumerate(y):
        # 10,001 points, then as many around the best of them: CE to about 1e-12.
        best, width = 0.5, 0.5
        for _ in range(2):
            grid = np.clip(np.linspace(best - width, best + width, 2001), 0, 1)
            best = min(grid, key=lambda a: mixed(z, (a, 1 - a), n, c))
            width /= 1000
        assert abs(mixed(z, found[:, n], n, c) - mixed(z, (best, 1 - best), n, c)) < 1e-7


def test_mixture_of_three_is_as_good_as_any_on_a_grid() -> None:
    z, y = draw(3, std=3.0, n=4, c=5)
    found = best_mixture(torch.tensor(z), torch.tensor(y)).numpy()
    grid = [(i / 60, j / 60, 1 - (i + j) / 60) for i, j in itertools.product(range(61), repeat=2) if i + j <= 60]
    for n, c in enumerate(y):
        least = min(mixed(z, a, n, c) for a in grid)
        assert mixed(z, found[:, n], n, c) <= least + 1e-7
        assert mixed(z, found[:, n], n, c) >= least - 0.05, "nor is it better than the simplex allows"


@pytest.mark.parametrize(("peers", "classes"), [(2, 10), (3, 1000), (4, 100), (8, 10)])
@pytest.mark.parametrize("std", [0.1, 1.0, 5.0, 30.0])
def test_mixture_is_within_its_tolerance(peers: int, classes: int, std: float) -> None:
    """The objective is convex, so that it exceeds the least by at most max_i <gradient, a - e_i>."""
    z, y = draw(peers, std=std, n=32, c=classes)
    a = best_mixture(torch.tensor(z), torch.tensor(y)).numpy()
    assert (a > 0).all()
    np.testing.assert_allclose(a.sum(0), 1, rtol=1e-12)
    for n, c in enumerate(y):
        p = np.exp(log_softmax(sum(a[i, n] * z[i, n] for i in range(peers))))
        gradient = np.array([p @ z[i, n] - z[i, n, c] for i in range(peers)])
        assert a[:, n] @ gradient - gradient.min() < 1e-7


def test_mixture_of_equal_peers_and_at_an_edge() -> None:
    z, y = draw(1)
    np.testing.assert_allclose(best_mixture(torch.tensor(np.repeat(z, 3, axis=0)), torch.tensor(y)), 1 / 3, rtol=1e-5)
    right = np.zeros((2, 1, C))
    right[0, 0, 2], right[1, 0, 3] = 5, 5
    a = best_mixture(torch.tensor(right), torch.tensor([2])).numpy()
    assert a[0, 0] > 1 - 1e-8, "a peer that is only wrong gets no weight"


@pytest.mark.gpu
def test_mixture_does_not_make_the_host_wait() -> None:
    z, y = draw(3, n=32)
    logits, targets = torch.tensor(z, device="cuda"), torch.tensor(y, device="cuda")
    found = best_mixture(logits, targets)  # the first call loads libraries
    torch.cuda.set_sync_debug_mode("error")
    try:
        best_mixture(logits, targets)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    torch.testing.assert_close(found.cpu(), best_mixture(logits.cpu(), targets.cpu()), rtol=1e-5, atol=1e-6)


def test_linear_teaches_the_mixture() -> None:
    z, y = draw(3)
    a = best_mixture(torch.tensor(z), torch.tensor(y)).numpy()
    target = np.stack([sum(a[i, n] * z[i, n] for i in range(3)) for n in range(N)])
    terms, _ = terms_of(kdcl(3, ensemble="linear"), z, y)
    np.testing.assert_allclose(terms[1, "kd"].item(), expected_kd(z, target, 1, 2.0), rtol=1e-5)


# -- general ----------------------------------------------------------------------------------------------------------


def test_general_begins_with_equal_weights() -> None:
    z, y = draw(3)
    terms, _ = terms_of(kdcl(3, ensemble="general"), z, y)
    np.testing.assert_allclose(terms[2, "kd"].item(), expected_kd(z, mean(z, y), 2, 2.0), rtol=3e-6)


@pytest.mark.parametrize("peers", [2, 3, 5])
def test_general_weights_are_the_closed_form(peers: int) -> None:
    method = kdcl(peers, ensemble="general")
    z, y = draw(peers, n=40, seed=3)
    parts = (slice(0, 15), slice(15, 40))
    surveyed = sum(
        method.survey([{"logits": torch.tensor(x[part])} for x in z], torch.tensor(y[part])) for part in parts
    )
    method.begin_epoch(surveyed / 40)
    errors = np.exp([[log_softmax(row) for row in x] for x in z]) - np.eye(C)[y]
    c = np.array(
        [[sum(errors[i, n] @ errors[j, n] for n in range(40)) / 40 for j in range(peers)] for i in range(peers)]
    )
    w = np.linalg.inv(c).sum(1) / np.linalg.inv(c).sum()
    np.testing.assert_allclose(method.mixture.numpy(), w, rtol=1e-6, atol=1e-7)
    # No other weights that sum to 1 leave a smaller squared error on the held-out images.
    for i in range(1, peers):
        for eps in (-0.01, 0.01):
            other = w.copy()
            other[0], other[i] = other[0] + eps, other[i] - eps
            assert other @ c @ other > w @ c @ w
    target = np.einsum("k,knc->nc", w, z)
    terms, _ = terms_of(method, z, y)
    np.testing.assert_allclose(terms[0, "kd"].item(), expected_kd(z, target, 0, 2.0), rtol=1e-5)


def test_general_gives_equal_peers_equal_weights() -> None:
    method = kdcl(3, ensemble="general")
    z, y = draw(1)
    method.begin_epoch(method.survey([{"logits": torch.tensor(z[0])}] * 3, torch.tensor(y)) / N)
    np.testing.assert_allclose(method.mixture.numpy(), 1 / 3, rtol=1e-6)


# -- the rest ---------------------------------------------------------------------------------------------------------


def test_one_peer_is_refused() -> None:
    with pytest.raises(ValueError, match=r"^kdcl needs at least 2 peers to teach each other, found 1$"):
        KDCL.check(KDCLOptions(), 1)


@pytest.mark.parametrize("options", [{"temperature": 0.0}, {"weight": -1.0}, {"ensemble": "median"}, {"tau": 1.0}])
def test_options_that_mean_nothing_are_refused(options: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=next(iter(options))):
        METHODS["kdcl"].Options(**options)


def test_the_example_by_hand() -> None:
    """Two peers, three classes, one image of class 0, by pencil: margins (0, -1, 2) and (0, 1, -3)."""
    z = np.array([[[1.0, 0.0, 3.0]], [[2.0, 3.0, -1.0]]])
    target = kdcl(2)._ensemble(torch.tensor(z), torch.tensor([0]))
    assert target.tolist() == [[0.0, -1.0, -3.0]]
    entropies = [math.log(1 + math.exp(-1) + math.exp(2)), math.log(1 + math.exp(1) + math.exp(-3))]
    chosen = kdcl(2, ensemble="naive")._ensemble(torch.tensor(z), torch.tensor([0]))
    assert chosen.tolist() == z[int(np.argmin(entropies))].tolist() == [[2.0, 3.0, -1.0]]

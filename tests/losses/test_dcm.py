"""Dense Cross-layer Mutual-distillation against its equations, written out as float64 loops over rows, heads and
peers."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from losses import METHODS, Method, Progress
from tests.losses.peers import peers as alike
from tests.losses.test_dml import kl, log_softmax

PROGRESS = Progress(step=3, steps_per_epoch=10, epochs=2)
N, C = 5, 6
STAGES = [(3, 8), (4, 4), (5, 2), (6, 1)]
BUILT: list[tuple[int, str]] = []


class Passing(nn.Module):
    """An auxiliary classifier whose logits are the map itself, so that a test chooses them."""

    def forward(self, maps: Tensor) -> dict[str, Tensor]:
        return {"logits": maps, "features": maps}


def auxiliary(stage: int, design: str) -> nn.Module:
    BUILT.append((stage, design))
    return Passing()


def draw(peers: int, std: float = 2.0, n: int = N, c: int = C) -> tuple[np.ndarray, np.ndarray]:
    """Logits [K, 3, n, c] of the heads ep1, ep2 and the peer's own, and classes [n]."""
    rng = np.random.default_rng(peers)
    return (std * rng.normal(size=(peers, 3, n, c))).astype(np.float32).astype(np.float64), rng.integers(c, size=n)


def run(z: np.ndarray, y: np.ndarray, residents: Any = None) -> tuple[dict[Any, Tensor], list[list[Tensor]], Method]:
    """The terms, and the leaves [K][3] that the logits came from; the others show what is sent and nothing else."""
    cls = METHODS["dcm"]
    infos = [replace(info, auxiliary=auxiliary) for info in alike(len(z), z.shape[-1], stages=STAGES)]
    method = cls(cls.Options(), infos)
    leaves = [[torch.tensor(x, dtype=torch.float32, requires_grad=True) for x in heads] for heads in z]
    residents = list(range(len(z))) if residents is None else residents
    signals = []
    for k, (ep1, ep2, logits) in enumerate(leaves):
        head = method.head(infos[k])
        assert head is not None
        shown = {"logits": logits, **head({"logits": logits, "stage2": ep1, "stage3": ep2})}
        assert set(shown) == set(method.signals)
        signals.append(shown if k in residents else {n: x for n, x in shown.items() if n not in method.private})
    return method(residents, signals, torch.tensor(y), PROGRESS), leaves, method


def expected_ce(z: np.ndarray, y: np.ndarray, k: int, h: int) -> float:
    return sum(-log_softmax(z[k, h, n])[y[n]] for n in range(len(y))) / len(y)


def expected_kl(z: np.ndarray, k: int) -> float:
    total = 0.0
    for j in range(len(z)):
        for h in range(3):
            for other in range(3):
                for n in range(z.shape[2]):
                    if j != k:
                        total += kl(log_softmax(z[j, other, n]), log_softmax(z[k, h, n]))
    return total / z.shape[2]


def gradient(z: np.ndarray, y: np.ndarray, k: int, h: int) -> np.ndarray:
    """[p_kh - y + sum over other peers and their heads of (p_kh - p_jh')] / N."""
    out = np.zeros(z.shape[2:])
    for n in range(z.shape[2]):
        own = np.exp(log_softmax(z[k, h, n]))
        out[n] = own
        out[n, y[n]] -= 1
        for j in range(len(z)):
            for other in range(3):
                if j != k:
                    out[n] += own - np.exp(log_softmax(z[j, other, n]))
    return out / z.shape[2]


@pytest.mark.parametrize("peers", [2, 3, 4])
def test_values_and_gradients(peers: int) -> None:
    z, y = draw(peers)
    terms, leaves, _ = run(z, y)
    assert set(terms) == {(k, name) for k in range(peers) for name in ("ce", "ce_ep1", "ce_ep2", "kl")}
    torch.stack(list(terms.values())).sum().backward()
    for k in range(peers):
        for h, name in enumerate(("ce_ep1", "ce_ep2", "ce")):
            np.testing.assert_allclose(terms[k, name].item(), expected_ce(z, y, k, h), rtol=2e-6)
            np.testing.assert_allclose(leaves[k][h].grad, gradient(z, y, k, h), rtol=1e-4, atol=1e-6)
        np.testing.assert_allclose(terms[k, "kl"].item(), expected_kl(z, k), rtol=5e-6)


def test_saturated_logits_are_exact() -> None:
    """Standard deviation 30 over 1000 classes, where the 1e-8 of the official code halves the KL."""
    z, y = draw(2, std=30.0, n=3, c=1000)
    terms, leaves, _ = run(z, y)
    torch.stack(list(terms.values())).sum().backward()
    np.testing.assert_allclose(terms[0, "kl"].item(), expected_kl(z, 0), rtol=1e-5)
    by_hand = gradient(z, y, 1, 0)
    np.testing.assert_allclose(leaves[1][0].grad, by_hand, rtol=1e-4, atol=1e-5 * np.abs(by_hand).max())


@pytest.mark.parametrize("residents", [[0], [2], [0, 2]])
def test_residents_get_their_own_terms_from_what_the_others_send(residents: list[int]) -> None:
    z, y = draw(3)
    whole, _, _ = run(z, y)
    part, _, _ = run(z, y, residents)
    assert {key: x.item() for key, x in part.items()} == {k: x.item() for k, x in whole.items() if k[0] in residents}


def test_what_is_sent_is_one_tensor_of_probabilities_and_a_number_a_row() -> None:
    z, y = draw(2)
    _, _, method = run(z, y)
    assert set(method.signals) - set(method.private) == {"probabilities", "negentropy"}
    head = method.head(replace(alike(1, C, stages=STAGES)[0], auxiliary=auxiliary))
    assert head is not None
    logits = [torch.tensor(x, dtype=torch.float32, requires_grad=True) for x in z[0]]
    shown = head({"stage2": logits[0], "stage3": logits[1], "logits": logits[2]})
    expected = sum(np.exp([log_softmax(row) for row in z[0, h]]) for h in range(3))
    np.testing.assert_allclose(shown["probabilities"], expected, rtol=1e-5)
    assert shown["negentropy"].shape == (N, 1)
    assert not shown["probabilities"].requires_grad
    assert not shown["negentropy"].requires_grad


def test_classifiers_go_on_after_the_two_stages_before_the_last_in_dcms_design() -> None:
    cls = METHODS["dcm"]
    assert list(cls.taps(cls.Options(), 4)) == [2, 3]
    assert list(cls.taps(cls.Options(), 3)) == [1, 2]
    BUILT.clear()
    z, y = draw(2)
    run(z, y)
    assert BUILT == [(2, "dcm"), (3, "dcm")] * 2


def test_what_it_cannot_train_is_refused() -> None:
    cls = METHODS["dcm"]
    with pytest.raises(ValueError, match=r"^dcm needs at least 2 peers to teach each other, found 1$"):
        cls.check(cls.Options(), 1)
    with pytest.raises(ValueError, match="found 2 stages"):
        cls.taps(cls.Options(), 2)

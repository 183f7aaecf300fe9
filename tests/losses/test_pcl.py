"""PCL against its equations, written out as float64 loops over rows, classes and peers."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch

from losses import METHODS, Progress
from losses.pcl import PCL, PCLOptions
from tests.losses.peers import peers as alike
from tests.losses.test_dml import draw, expected_ce, kl, log_softmax

N, C, D = 6, 7, 5


def pcl(peers: int, **options: Any) -> PCL:
    torch.manual_seed(0)
    return PCL(PCLOptions(**options), alike(peers, C, D))


def at(epoch: int) -> Progress:
    return Progress(step=10 * epoch + 3, steps_per_epoch=10, epochs=300)


class Drawn:
    """Logits, features and teachers' logits [m, N, .] and classes, in float64, and their terms."""

    def __init__(self, peers: int, seed: int = 0) -> None:
        self.z, self.y = draw(peers, seed=seed)
        self.teachers, _ = draw(peers, seed=seed + 100)
        self.h = draw(peers, seed=seed + 200, c=D)[0]

    def terms(self, method: PCL, epoch: int = 20, residents: Any = None) -> tuple[dict, list[dict[str, torch.Tensor]]]:
        shown = [
            {
                name: torch.tensor(x, dtype=torch.float32, requires_grad=True)
                for name, x in (("logits", z), ("features", h), ("teacher", t))
            }
            for z, h, t in zip(self.z, self.h, self.teachers, strict=True)
        ]
        residents = range(len(self.z)) if residents is None else residents
        return method(residents, shown, torch.tensor(self.y), at(epoch)), shown

    def ensemble(self, method: PCL) -> np.ndarray:
        """z_E = W_E [h_1; ...; h_m] + b_E."""
        w, b = (p.detach().double().numpy() for p in method.ensemble.parameters())
        return np.stack([w @ np.concatenate([h[n] for h in self.h]) + b for n in range(N)])


def kd(z: np.ndarray, target: np.ndarray, t: float) -> float:
    return t * t * sum(kl(log_softmax(target[n], t), log_softmax(z[n], t)) for n in range(len(z))) / len(z)


W20 = math.exp(-5 * (1 - 20 / 80) ** 2)


@pytest.mark.parametrize("t", [1.0, 3.0])
@pytest.mark.parametrize("peers", [2, 3, 4])
def test_values(peers: int, t: float) -> None:
    method, drawn = pcl(peers, temperature=t, weight=0.7), Drawn(peers)
    terms, _ = drawn.terms(method)
    assert set(terms) == {(None, "ce_ensemble")} | {
        (k, name) for k in range(peers) for name in ("ce", "kd_ensemble", "kd_teachers")
    }
    ensemble = drawn.ensemble(method)
    np.testing.assert_allclose(terms[None, "ce_ensemble"].item(), expected_ce(ensemble[None], drawn.y, 0), rtol=3e-6)
    for j in range(peers):
        others = [kd(drawn.z[j], drawn.teachers[k], t) for k in range(peers) if k != j]
        np.testing.assert_allclose(terms[j, "ce"].item(), expected_ce(drawn.z, drawn.y, j), rtol=3e-6)
        np.testing.assert_allclose(terms[j, "kd_ensemble"].item(), 0.7 * W20 * kd(drawn.z[j], ensemble, t), rtol=3e-6)
        np.testing.assert_allclose(terms[j, "kd_teachers"].item(), 0.7 * W20 * sum(others) / (peers - 1), rtol=3e-6)


def softmax(row: np.ndarray, t: float = 1.0) -> np.ndarray:
    return np.exp(log_softmax(row, t))


def test_gradients() -> None:
    """Of logits, features and W_E, by hand."""
    method, drawn = pcl(3), Drawn(3, seed=1)
    terms, shown = drawn.terms(method)
    torch.stack(list(terms.values())).sum().backward()
    ensemble, t, one_hot = drawn.ensemble(method), 3.0, np.eye(C)[drawn.y]
    of_ensemble = np.stack([softmax(row) for row in ensemble]) - one_hot
    w = method.ensemble.weight.detach().double().numpy()
    for j in range(3):
        by_hand, through = np.zeros((N, C)), np.zeros((N, D))
        for n in range(N):
            own = softmax(drawn.z[j, n], t)
            by_hand[n] = softmax(drawn.z[j, n]) - one_hot[n] + W20 * t * (own - softmax(ensemble[n], t))
            for k in range(3):
                if k != j:
                    by_hand[n] += W20 / 2 * t * (own - softmax(drawn.teachers[k, n], t))
            through[n] = w[:, j * D : (j + 1) * D].T @ of_ensemble[n]
        np.testing.assert_allclose(shown[j]["logits"].grad, by_hand / N, rtol=1e-4, atol=1e-6)
        np.testing.assert_allclose(shown[j]["features"].grad, through / N, rtol=1e-4, atol=1e-6)
    joined = np.concatenate(list(drawn.h), axis=1)
    np.testing.assert_allclose(method.ensemble.weight.grad, of_ensemble.T @ joined / N, rtol=1e-4, atol=1e-6)
    np.testing.assert_allclose(method.ensemble.bias.grad, of_ensemble.mean(0), rtol=1e-4, atol=1e-6)


def test_what_is_constant() -> None:
    """CE(z_E) reaches all features and W_E; distillation reaches the peer's own logits and nothing else."""
    method, drawn = pcl(3), Drawn(3)
    for k, name in [(None, "ce_ensemble"), (1, "ce"), (1, "kd_ensemble"), (1, "kd_teachers")]:
        method.zero_grad()
        terms, shown = drawn.terms(method)
        terms[k, name].backward()
        reached = {(j, key) for j, peer in enumerate(shown) for key, x in peer.items() if x.grad is not None}
        assert reached == ({(j, "features") for j in range(3)} if k is None else {(1, "logits")})
        assert (method.ensemble.weight.grad is not None) == (k is None)


def test_the_own_teacher_does_not_teach() -> None:
    method, drawn = pcl(3), Drawn(3)
    before = {key: x.item() for key, x in drawn.terms(method)[0].items()}
    drawn.teachers[1] += np.arange(C)
    after = {key: x.item() for key, x in drawn.terms(method)[0].items()}
    assert {key for key in before if before[key] != after[key]} == {(0, "kd_teachers"), (2, "kd_teachers")}


RAMPS = {
    "paper": {0: 0.006738, 10: 0.02175, 20: 0.0601, 40: 0.2865, 60: 0.7316, 79: 0.99922, 80: 1.0, 200: 1.0},
    "repository": {0: 0.006738, 1: 1.0, 2: 0.006738, 3: 2.0612e-9, 4: 2.8625e-20, 80: 0.0, 81: 1.0, 299: 1.0},
    "none": {0: 1.0, 80: 1.0},
}


@pytest.mark.parametrize(("name", "epoch", "weight"), [(n, e, w) for n, ws in RAMPS.items() for e, w in ws.items()])
def test_ramp_up_at_the_epochs_of_the_specification(name: str, epoch: int, weight: float) -> None:
    drawn = Drawn(2)
    full, _ = drawn.terms(pcl(2, ramp_up="none"), epoch)
    terms, _ = drawn.terms(pcl(2, ramp_up=name), epoch)
    for key in ((0, "kd_ensemble"), (1, "kd_teachers")):
        np.testing.assert_allclose((terms[key] / full[key]).item(), weight, rtol=1e-3, atol=1e-30)
    for key in ((0, "ce"), (None, "ce_ensemble")):
        assert terms[key] == full[key]


@pytest.mark.parametrize(
    ("step", "decay"), [(0, 0.0), (1, 0.5), (2, 2 / 3), (9, 0.9), (998, 0.998999), (999, 0.999), (10**6, 0.999)]
)
def test_decay_of_the_teachers(step: int, decay: float) -> None:
    np.testing.assert_allclose(PCL.teacher_decay(PCLOptions(), step), decay, rtol=1e-6)


def test_residents_get_exactly_their_own_terms_and_the_whole_ensemble() -> None:
    method, drawn = pcl(4), Drawn(4)
    whole, _ = drawn.terms(method)
    part, _ = drawn.terms(method, residents=[1, 3])
    assert part == {key: v for key, v in whole.items() if key[0] in (None, 1, 3)}


def test_the_logits_of_others_are_not_looked_at() -> None:
    method, drawn = pcl(2), Drawn(2)
    _, shown = drawn.terms(method)
    del shown[1]["logits"]
    assert set(method([0], shown, torch.tensor(drawn.y), at(0))) == {
        (None, "ce_ensemble"), (0, "ce"), (0, "kd_ensemble"), (0, "kd_teachers")
    }  # fmt: skip


def test_the_trunk_is_all_but_the_last_stage() -> None:
    assert [PCL.trunk(PCLOptions(), stages) for stages in (3, 4, 5)] == [2, 3, 4]


@pytest.mark.parametrize(
    ("features", "classes", "parameters"),
    [(64, 100, 19_300), (256, 100, 76_900), (512, 100, 153_700), (132, 100, 39_700)],
)
def test_the_ensemble_classifier_has_the_papers_size(features: int, classes: int, parameters: int) -> None:
    method = PCL(PCLOptions(), alike(3, classes, features))
    assert sum(p.numel() for p in method.parameters()) == parameters


def test_one_peer_is_refused() -> None:
    with pytest.raises(ValueError, match=r"^pcl needs at least 2 peers to teach each other, found 1$"):
        PCL.check(PCLOptions(), 1)


@pytest.mark.parametrize("options", [{"temperature": 0.0}, {"max_decay": 1.0}, {"ramp_up": "linear"}, {"tau": 1.0}])
def test_options_that_mean_nothing_are_refused(options: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=next(iter(options))):
        METHODS["pcl"].Options(**options)

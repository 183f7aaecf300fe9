"""Codistillation against its equation in float64 loops, its copies computed apart by plain networks."""

from __future__ import annotations

import copy
from collections.abc import Collection, Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from losses import METHODS, Method, Progress, Signals
from losses.capabilities import AfterStep
from tests.losses.peers import peers as alike
from tests.losses.test_dml import expected_ce, kl, log_softmax

N, C = 5, 6


def network() -> nn.Module:
    """With all that differs between training and evaluation."""
    return nn.Sequential(nn.Flatten(), nn.Linear(12, 8), nn.BatchNorm1d(8), nn.Dropout(0.5), nn.Linear(8, C))


def codistillation(peers: int, there: Collection[int] | None = None, **options: Any) -> Method:
    """With copies of the peers `there`, of all if it is None."""
    cls = METHODS["codistillation"]
    torch.manual_seed(peers)
    method = cls(cls.Options(**options), [replace(info, network=network) for info in alike(peers, C)])
    with torch.no_grad():
        for x in method.state_dict().values():
            x.add_(0.1 * torch.rand(x.shape)) if x.is_floating_point() else None
    method.set_extra_state(torch.tensor([there is None or j in there for j in range(peers)]))
    return method


def at(step: int) -> Progress:
    return Progress(step, steps_per_epoch=10, epochs=2)


def answer(method: Method, j: int, images: Tensor) -> np.ndarray:
    """Log probabilities of the copy of peer j in float64, row by row, as nothing depends on the other rows."""
    double = copy.deepcopy(method.get_submodule(f"copies.{j}")).double().eval()
    with torch.no_grad():
        rows = [double(images[n : n + 1].double())[0].numpy() for n in range(len(images))]
    return np.array([log_softmax(row) for row in rows])


def draw(peers: int) -> tuple[np.ndarray, np.ndarray, list[Tensor]]:
    rng = np.random.default_rng(peers)
    z = (2 * rng.normal(size=(peers, N, C))).astype(np.float32).astype(np.float64)
    images = [torch.tensor(rng.normal(size=(N, 3, 2, 2)), dtype=torch.float32) for _ in range(peers)]
    return z, rng.integers(C, size=N), images


@pytest.mark.parametrize("views", ["shared", "per_peer"])
@pytest.mark.parametrize("peers", [2, 3, 4])
def test_values_and_gradients(peers: int, views: str) -> None:
    check_values_and_gradients(peers, views, range(peers))


@pytest.mark.parametrize("there", [[0], [2], [0, 2], [1, 3], [0, 1, 3], []], ids=str)
def test_the_mean_is_over_those_peers_of_which_there_is_a_copy(there: list[int]) -> None:
    check_values_and_gradients(4, "shared", there)


def check_values_and_gradients(peers: int, views: str, there: Collection[int]) -> None:
    z, y, images = draw(peers)
    seen = {k: images[k if views == "per_peer" else 0] for k in range(peers)}
    method = codistillation(peers, there, interval=4, weight=0.7)
    logits = [torch.tensor(x, dtype=torch.float32, requires_grad=True) for x in z]
    shown = method.look(seen, at(4))
    signals = [{"logits": x, **shown.get(k, {})} for k, x in enumerate(logits)]
    terms = method(range(peers), signals, torch.tensor(y), at(4))
    torch.stack(list(terms.values())).sum().backward()
    for k in range(peers):
        p = np.exp([log_softmax(row) for row in z[k]])
        teachers = [answer(method, j, seen[k]) for j in there if j != k]
        # Without a teacher the term is 0, as if the peer taught itself.
        q = np.mean(np.exp(teachers), axis=0) if teachers else p
        expected = sum(kl(list(np.log(q[n])), log_softmax(z[k, n])) for n in range(N)) / N
        np.testing.assert_allclose(terms[k, "ce"].item(), expected_ce(z, y, k), rtol=2e-6)
        np.testing.assert_allclose(terms[k, "kl"].item(), 0.7 * expected, rtol=1e-5, atol=1e-12)
        by_hand = (p - np.eye(C)[y] + 0.7 * (p - q)) / N
        np.testing.assert_allclose(logits[k].grad, by_hand, rtol=1e-4, atol=1e-6)


def after(method: Method, step: int, peer: nn.Module, others: Mapping[int, nn.Module]) -> None:
    """What the engine does after a step: peer 0 lives here, and of `others` weights have come."""

    def exchange(own: Mapping[int, Signals], *, wire: torch.dtype = torch.float32) -> Sequence[Signals]:
        came = {j: {"weights": torch.cat([x.flatten() for x in floats(other)])} for j, other in others.items()}
        return [{**came, **own}.get(j, {}) for j in range(method.num_peers)]

    method.after_step(
        AfterStep(
            residents={0: nn.ModuleDict({"network": peer})},
            exchange=exchange,
            average_buffers=lambda: None,
            everywhere=[],
            skipped=torch.zeros(1),
            progress=at(step),
        )
    )


def floats(module: nn.Module) -> list[Tensor]:
    """In the order of the method: parameters, then statistics."""
    return [*(p.detach() for p in module.parameters()), *(b for b in module.buffers() if b.is_floating_point())]


@pytest.mark.parametrize(("burn_in", "interval", "first"), [(0, 4, 4), (6, 4, 6), (2, 4, 2)])
def test_cross_entropy_alone_until_the_first_copies(burn_in: int, interval: int, first: int) -> None:
    z, y, images = draw(2)
    method, own, other = codistillation(2, [], burn_in=burn_in, interval=interval), network(), network()
    for step in range(8):
        shown = method.look({0: images[0]}, at(step))
        assert bool(shown) == (step >= first)
        terms = method([0], [{"logits": torch.tensor(z[0]), **shown.get(0, {})}, {}], torch.tensor(y), at(step))
        assert (terms[0, "kl"].item() > 0) == (step >= first)
        after(method, step, own, {1: other})


def test_a_copy_of_which_nothing_new_comes_stays_what_it_is() -> None:
    method, own, others = codistillation(3, [], interval=2), network(), {j: network() for j in (1, 2)}
    expected: dict[int, list[Tensor]] = {}
    for step, came in enumerate([[1, 2], [2], [1, 2], [1], [1], [], [], [2]]):
        after(method, step, own, {j: others[j] for j in came})
        if step % 2:
            expected |= {j: [x.clone() for x in floats(others[j])] for j in came}
        for j, copied in expected.items():
            assert all(map(torch.equal, floats(method.get_submodule(f"copies.{j}")), copied)), (step, j)
        assert method.get_extra_state().tolist() == [step > 0, step > 2, step > 0]
        for other in others.values():
            for x in floats(other):
                x.add_(1)


def test_copies_learn_nothing_by_themselves_and_are_in_evaluation_mode() -> None:
    method = codistillation(2)
    assert not any(p.requires_grad for p in method.parameters())
    assert not any(module.training for module in method.get_submodule("copies").modules())
    before = {name: x.clone() for name, x in method.state_dict().items()}
    method.look({0: draw(2)[2][0]}, at(50))
    assert all(torch.equal(x, before[name]) for name, x in method.state_dict().items())


def test_one_resident_asks_the_copies_of_the_others_alone() -> None:
    method, asked = codistillation(3), []
    for j in range(3):
        method.get_submodule(f"copies.{j}").register_forward_hook(lambda *_, j=j: asked.append(j))
    images = draw(3)[2]
    method.look({1: images[0]}, at(50))
    assert asked == [0, 2]
    asked.clear()
    method.look(dict.fromkeys(range(3), images[0]), at(50))
    assert sorted(asked) == [0, 1, 2]


def test_what_means_nothing_is_refused() -> None:
    cls = METHODS["codistillation"]
    with pytest.raises(ValueError, match=r"^codistillation needs at least 2 peers to teach each other, found 1$"):
        cls.check(cls.Options(), 1)
    for options in ({"interval": 0}, {"burn_in": -1}, {"weight": -1.0}, {"wire": "fp16"}):
        with pytest.raises(ValueError, match=next(iter(options))):
            cls.Options(**options)

"""Independent training against its equation."""

from __future__ import annotations

import numpy as np
import torch

from losses import METHODS, Progress
from losses.capabilities import turns_of
from tests.losses.peers import peers as alike

PROGRESS = Progress(step=3, steps_per_epoch=10, epochs=2)


def independent(peers: int):
    cls = METHODS["independent"]
    return cls(cls.Options(name="independent"), alike(peers, 4))


def test_each_resident_has_its_own_cross_entropy_and_nothing_else() -> None:
    rng = np.random.default_rng(0)
    z, y = rng.normal(size=(3, 5, 4)), rng.integers(4, size=5)
    signals = [{"logits": torch.tensor(x, dtype=torch.float32)} for x in z]
    terms = independent(3)([0, 2], signals, torch.tensor(y), PROGRESS)
    assert set(terms) == {(0, "ce"), (2, "ce")}
    for k in (0, 2):
        expected = np.mean([np.log(np.exp(z[k, n]).sum()) - z[k, n, y[n]] for n in range(5)])
        np.testing.assert_allclose(terms[k, "ce"].item(), expected, rtol=1e-6)


def test_signals_of_the_others_may_be_missing() -> None:
    signals = [{}, {"logits": torch.zeros(2, 4)}]
    terms = independent(2)([1], signals, torch.tensor([0, 3]), PROGRESS)
    np.testing.assert_allclose(terms[1, "ce"].item(), np.log(4), rtol=1e-6)


def test_nothing_is_exchanged_and_one_peer_is_enough() -> None:
    cls = METHODS["independent"]
    assert cls.exchange == "none"
    cls.check(cls.Options(name="independent"), 1)
    assert [list(turn) for turn in turns_of(cls, cls.Options(name="independent"), 3)] == [[0, 1, 2]]

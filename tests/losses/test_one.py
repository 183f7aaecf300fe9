"""ONE against its equations in float64, its gate too."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import pytest
import torch
from torch import Tensor

from losses import METHODS, Terms
from tests.losses.double import Leaves, assert_agrees, at_epoch, batch_norm, ce, draw, kd, reached, softmax
from tests.losses.peers import peers as alike


def one(peers: int, channels: int = 5, **options: Any):
    cls = METHODS["one"]
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return cls(cls.Options(**options), alike(peers, 7, stages=[(3, 8), (channels, 4), (9, 2)]))


def gated(signals: Leaves, p: Mapping[str, Tensor]) -> Tensor:
    pooled = signals[0]["trunk"].sum((2, 3)) / 16
    scores = pooled @ p["gate.linear.weight"].T + p["gate.linear.bias"]
    gate = softmax(batch_norm(scores, p["gate.norm.weight"], p["gate.norm.bias"]).clamp(min=0))
    return sum(gate[:, k : k + 1] * peer["logits"] for k, peer in enumerate(signals))


@pytest.mark.parametrize(("epoch", "ramp", "weight"), [(0, 80, math.exp(-5)), (20, 80, 0.0600547), (0, 0, 1.0)])
@pytest.mark.parametrize("peers", [2, 3])
def test_terms_and_gradients(peers: int, epoch: int, ramp: int, weight: float) -> None:
    signals, y = draw(peers, logits=(7,), trunk=(5, 4, 4))
    method = one(peers, ramp_up_epochs=ramp)

    def reference(signals: Leaves, p: Mapping[str, Tensor], y: Tensor) -> Terms:
        ensemble = gated(signals, p)
        terms: Terms = {(None, "ce_ensemble"): ce(ensemble, y)}
        for k, peer in enumerate(signals):
            terms[k, "ce"] = ce(peer["logits"], y)
            terms[k, "kd"] = weight * kd(peer["logits"], ensemble.detach())
        return terms

    assert_agrees(method, signals, y, epoch, reference, 1e-5)


def test_where_gradients_stop() -> None:
    signals, y = draw(3, logits=(7,), trunk=(5, 4, 4))
    method = one(3)
    gate = {"method/gate.linear.weight", "method/gate.norm.weight", "method/gate.norm.bias"}
    everything = {"0/logits", "1/logits", "2/logits", "trunk"} | gate
    # The bias before BatchNorm moves nothing; rounding may or may not leave it a gradient.
    assert reached(method, signals, y, (None, "ce_ensemble")) - {"method/gate.linear.bias"} == everything
    assert reached(method, signals, y, (1, "kd")) == {"1/logits"}
    assert reached(method, signals, y, (1, "ce")) == {"1/logits"}


def test_any_resident_shows_the_trunks_map_to_the_gate() -> None:
    signals, y = draw(3, logits=(7,), trunk=(5, 4, 4))
    method, values = one(3), []
    for k in range(3):
        seen = [{n: x.float() for n, x in peer.items() if n != "trunk" or j == k} for j, peer in enumerate(signals)]
        values.append(method([k], seen, y, at_epoch(3))[None, "ce_ensemble"].item())
    assert values[0] == values[1] == values[2]


def test_the_gate_of_resnet_32() -> None:
    cls = METHODS["one"]
    method = cls(cls.Options(), alike(3, 100, stages=[(16, 32), (32, 16), (64, 8)]))
    assert {name: tuple(p.shape) for name, p in method.named_parameters()} == {
        "gate.linear.weight": (3, 32),
        "gate.linear.bias": (3,),
        "gate.norm.weight": (3,),
        "gate.norm.bias": (3,),
    }
    weights = method.gate(torch.randn(8, 32, 16, 16))
    torch.testing.assert_close(weights.sum(1), torch.ones(8))


def test_defaults_are_those_of_the_published_scripts() -> None:
    options = METHODS["one"].Options()
    assert (options.temperature, options.weight, options.ramp_up_epochs) == (3.0, 1.0, 80)


def test_one_peer_is_refused() -> None:
    cls = METHODS["one"]
    with pytest.raises(ValueError, match=r"^one needs at least 2 peers to make an ensemble of, found 1$"):
        cls.check(cls.Options(), 1)

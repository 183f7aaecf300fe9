"""OKDDip against its equations in float64, its attention too."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from losses import METHODS, Terms
from tests.losses.double import Leaves, assert_agrees, ce, draw, kd, kl, reached, softmax
from tests.losses.peers import peers as alike

WIDTH = 16


def okddip(peers: int, **options: Any):
    cls = METHODS["okddip"]
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return cls(cls.Options(**options), alike(peers, 7, WIDTH))


def attention(signals: Leaves, p: Mapping[str, Tensor], a: int) -> list[Tensor]:
    """A_ab of all peers b, [N, 1] each."""
    q = signals[a]["features"] @ p["query.weight"].T
    scores = [(q * (peer["features"] @ p["key.weight"].T)).sum(1) for peer in signals[:-1]]
    weights = softmax(torch.stack(scores, 1))
    return [weights[:, b : b + 1] for b in range(len(scores))]


def draws(peers: int) -> tuple[list[dict[str, Tensor]], Tensor]:
    return draw(peers, logits=(7,), features=(WIDTH,))


@pytest.mark.parametrize("form", ["branch", "network"])
@pytest.mark.parametrize(("epoch", "ramp", "weight"), [(0, 80, math.exp(-5)), (60, 80, 0.7316156), (0, 0, 1.0)])
@pytest.mark.parametrize("peers", [3, 4])
def test_mixed_logits(peers: int, epoch: int, ramp: int, weight: float, form: str) -> None:
    signals, y = draws(peers)

    def reference(signals: Leaves, p: Mapping[str, Tensor], y: Tensor) -> Terms:
        *z, leader = (peer["logits"] for peer in signals)
        terms: Terms = {(k, "ce"): ce(peer["logits"], y) for k, peer in enumerate(signals)}
        mixed = [sum(w * x for w, x in zip(attention(signals, p, a), z, strict=True)) for a in range(peers - 1)]
        terms[None, "kd"] = weight * sum(kd(z[a], mixed[a]) for a in range(peers - 1))
        terms[None, "kd_leader"] = weight * kd(leader, sum(z) / len(z))
        return terms

    assert_agrees(okddip(peers, ramp_up_epochs=ramp, form=form), signals, y, epoch, reference, 1e-5)


@pytest.mark.parametrize("peers", [3, 4])
def test_mixed_probabilities(peers: int) -> None:
    signals, y = draws(peers)

    def reference(signals: Leaves, p: Mapping[str, Tensor], y: Tensor) -> Terms:
        *z, leader = (peer["logits"] for peer in signals)
        q = [softmax(x / 2) for x in z]
        terms: Terms = {(k, "ce"): ce(peer["logits"], y) for k, peer in enumerate(signals)}
        mixed = [sum(w * x for w, x in zip(attention(signals, p, a), q, strict=True)) for a in range(peers - 1)]
        terms[None, "kd"] = 4 * sum(kl(mixed[a], q[a]) for a in range(peers - 1))
        terms[None, "kd_leader"] = 4 * kl(sum(q) / len(q), softmax(leader / 2))
        return terms

    assert_agrees(okddip(peers, mix="probabilities", temperature=2.0), signals, y, 100, reference, 1e-5)


def test_nothing_is_detached_and_the_leaders_features_are_not_used() -> None:
    signals, y = draws(4)
    method = okddip(4)
    peers = {f"{k}/logits" for k in range(3)}
    attending = {f"{k}/features" for k in range(3)} | {"method/query.weight", "method/key.weight"}
    assert reached(method, signals, y, (None, "kd")) == peers | attending
    assert reached(method, signals, y, (None, "kd_leader")) == peers | {"3/logits"}
    assert reached(method, signals, y, (3, "ce")) == {"3/logits"}


@pytest.mark.parametrize(("width", "expected"), [(64, 1_024), (256, 16_384), (2048, 1_048_576)])
def test_parameters_of_the_attention_are_the_papers(width: int, expected: int) -> None:
    cls = METHODS["okddip"]
    method = cls(cls.Options(), alike(4, 7, width))
    assert sum(p.numel() for p in method.parameters()) == expected


def test_what_is_shared() -> None:
    cls = METHODS["okddip"]
    assert cls.trunk(cls.Options(), 3) == 2
    assert cls.trunk(cls.Options(form="network"), 3) is None


def test_peers_of_unequal_widths_are_refused_and_a_leader_of_another_is_not() -> None:
    cls, (a, b, leader) = METHODS["okddip"], alike(3, 7, WIDTH)
    cls(cls.Options(form="network"), [a, b, replace(leader, num_features=32)])
    with pytest.raises(ValueError, match=r"found features of widths \[16, 32\]; expected networks with features of"):
        cls(cls.Options(form="network"), [a, replace(b, num_features=32), leader])


def test_two_peers_are_refused() -> None:
    cls = METHODS["okddip"]
    with pytest.raises(ValueError, match=r"^okddip needs at least 2 peers and the leader, .*; found 2$"):
        cls.check(cls.Options(), 2)

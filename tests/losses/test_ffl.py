"""FFL against its equations in float64, its fusion too."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import pytest
import torch
from torch import Tensor

from losses import METHODS, Terms
from tests.losses.double import Leaves, assert_agrees, batch_norm, ce, draw, kd, reached
from tests.losses.peers import peers as alike

CHANNELS, SIDE = 3, 4


def ffl(peers: int, **options: Any):
    cls = METHODS["ffl"]
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return cls(cls.Options(**options), alike(peers, 7, stages=[(2, 8), (CHANNELS, SIDE)]))


def fused(signals: Leaves, p: Mapping[str, Tensor]) -> Tensor:
    p = {name.removeprefix("fusion.layers."): x for name, x in p.items()}
    maps = torch.cat([peer["map"] for peer in signals], 1)
    framed = torch.nn.functional.pad(maps, (1, 1, 1, 1))
    x = sum(
        framed[:, :, i : i + SIDE, j : j + SIDE] * p["0.weight"][:, 0, i, j].reshape(1, -1, 1, 1)
        for i in range(3)
        for j in range(3)
    )
    x = batch_norm(x, p["1.weight"], p["1.bias"]).clamp(min=0)
    x = torch.einsum("nihw,oi->nohw", x, p["3.weight"][:, :, 0, 0])
    x = batch_norm(x, p["4.weight"], p["4.bias"]).clamp(min=0)
    return x.sum((2, 3)) / SIDE**2 @ p["8.weight"].T + p["8.bias"]


@pytest.mark.parametrize(("epoch", "ramp", "weight"), [(0, 80, math.exp(-5)), (40, 80, 0.2865048), (0, 0, 1.0)])
@pytest.mark.parametrize("peers", [2, 3])
def test_terms_and_gradients(peers: int, epoch: int, ramp: int, weight: float) -> None:
    signals, y = draw(peers, logits=(7,), map=(CHANNELS, SIDE, SIDE))

    def reference(signals: Leaves, p: Mapping[str, Tensor], y: Tensor) -> Terms:
        z_f = fused(signals, p)
        z_m = sum(peer["logits"] for peer in signals) / peers
        terms: Terms = {(None, "ce_fused"): ce(z_f, y), (None, "kd_fused"): weight * kd(z_f, z_m.detach())}
        for k, peer in enumerate(signals):
            terms[k, "ce"] = ce(peer["logits"], y)
            terms[k, "kd"] = weight * kd(peer["logits"], z_f.detach())
        return terms

    assert_agrees(ffl(peers, ramp_up_epochs=ramp), signals, y, epoch, reference, 2e-5)


def test_where_gradients_stop() -> None:
    signals, y = draw(2, logits=(7,), map=(CHANNELS, SIDE, SIDE))
    method = ffl(2)
    everything = {"0/map", "1/map", *(f"method/{name}" for name, _ in method.named_parameters())}
    assert reached(method, signals, y, (None, "ce_fused")) == everything
    assert reached(method, signals, y, (None, "kd_fused")) == everything
    assert reached(method, signals, y, (0, "kd")) == {"0/logits"}
    assert reached(method, signals, y, (1, "ce")) == {"1/logits"}


@pytest.mark.parametrize(("channels", "classes", "expected"), [(64, 100, 16_228), (2048, 1000, 10_486_760)])
def test_parameters_of_the_fusion_are_the_papers(channels: int, classes: int, expected: int) -> None:
    cls = METHODS["ffl"]
    with torch.device("meta"):
        method = cls(cls.Options(), alike(2, classes, stages=[(8, 16), (channels, 8)]))
    assert sum(p.numel() for p in method.parameters()) == expected


@pytest.mark.parametrize("stages", [2, 3, 4])
def test_the_map_is_that_of_the_last_stage(stages: int) -> None:
    cls = METHODS["ffl"]
    assert list(cls.taps(cls.Options(), stages)) == [stages]
    assert cls.trunk(cls.Options(), stages) == stages - 1
    head = ffl(2).head(alike(1, 7, stages=[(2 * s, 2) for s in range(stages)])[0])
    maps = {f"stage{s}": torch.full((1,), float(s)) for s in range(1, stages + 1)}
    assert head(maps)["map"].item() == stages


def test_one_peer_is_refused() -> None:
    cls = METHODS["ffl"]
    with pytest.raises(ValueError, match=r"^ffl needs at least 2 peers to fuse, found 1$"):
        cls.check(cls.Options(), 1)

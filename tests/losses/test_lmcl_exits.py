"""What L-MCL attaches to a peer: exits after each stage, gates, projections."""

from __future__ import annotations

from dataclasses import replace
from functools import partial

import numpy as np
import pytest
import torch
from torch import nn

import models
from losses import PeerInfo
from losses.lmcl import LMCL, Exits, LMCLOptions
from models import heads
from models.stages import stages
from tests.losses.peers import peers as alike
from tests.losses.test_lmcl import C, D, N


def info(name: str, classes: int, side: int) -> PeerInfo:
    network = models.create(name, classes)
    found = stages(network, 3, side)
    return PeerInfo(
        index=0,
        num_classes=classes,
        num_features=models.pooled_features(network)[1],
        stages=[(stage.channels, stage.side) for stage in found],
        auxiliary=partial(heads.auxiliary, name, {}, classes, 3, side),
        projection=heads.Projection,
        network=partial(models.create, name, classes),
    )


def count(module: nn.Module) -> int:
    return sum(p.numel() for p in module.parameters())


@pytest.mark.parametrize(
    ("name", "side", "classes", "expected"),
    [
        ("cifar_resnet32_b", 32, 100, (148_992, 25_094, 49_920)),
        ("cifar_wrn_16_2", 32, 100, (198_144, 99_334, 99_072)),
        ("cifar_resnet110_bottleneck", 32, 100, (296_448, 395_270, 197_376)),
        ("cifar_hcgnet_a1", 32, 100, (417_792, 1_031_694, 318_720)),
        ("cifar_shufflenetv2_x1_0", 32, 100, (886_272, 6_299_654, 787_200)),
        ("torchvision/resnet18", 224, 1000, (657_408, 2_102_280, 525_312)),
        ("torchvision/resnet50", 224, 1000, (2_230_272, 33_574_920, 2_098_176)),
    ],
)
def test_sizes_of_what_is_attached(name: str, side: int, classes: int, expected: tuple[int, ...]) -> None:
    """Projections, gates and the weights' projections of two peers, as published; sizes of auxiliary classifiers are in
    the tests of `models.heads`."""
    with torch.device("meta"):
        peer = info(name, classes, side)
        exits = Exits(replace(peer, auxiliary=lambda stage, design: nn.Identity()), 128)
    assert tuple(2 * count(x) for x in (exits.projections, exits.gate, exits.match)) == expected
    assert len(exits.auxiliary) == len(peer.stages) - 1


def test_what_exits_show() -> None:
    """Of a real network: shapes, unit rows, the gated mean of the exits' logits, and the weights' cosines."""
    torch.manual_seed(0)
    peer = info("cifar_resnet8_b", C, 32)
    exits = Exits(peer, D)
    seen = {
        "stage1": torch.randn(N, peer.stages[0][0], 8, 8),
        "stage2": torch.randn(N, peer.stages[1][0], 4, 4),
        "features": torch.randn(N, peer.num_features),
        "logits": torch.randn(N, C),
    }
    found = exits(seen)
    assert {name: tuple(x.shape) for name, x in found.items()} == {
        "exits": (N, 3, C), "aggregate": (N, C), "embeddings": (N, 3, D), "match": (N, 3, 128)
    }  # fmt: skip
    for name in ("embeddings", "match"):
        np.testing.assert_allclose(found[name].detach().norm(dim=-1), 1, rtol=1e-6)
    assert torch.equal(found["exits"][:, 2], seen["logits"])

    kept = [head(seen[f"stage{j}"]) for j, head in enumerate(exits.auxiliary, 1)]
    features = [*(x["features"] for x in kept), seen["features"]]
    first, _, second = exits.gate
    hidden = (torch.cat(features, 1) @ first.weight.T + first.bias).clamp(min=0)
    gate = (hidden @ second.weight.T + second.bias).exp()
    gate = gate / gate.sum(1, keepdim=True)
    aggregate = sum(gate[:, s : s + 1] * found["exits"][:, s] for s in range(3))
    torch.testing.assert_close(found["aggregate"], aggregate, rtol=1e-5, atol=1e-6)
    for s, f in enumerate(features):
        a, _, b = exits.projections[s].layers
        e = (f @ a.weight.T + a.bias).clamp(min=0) @ b.weight.T + b.bias
        p = f @ exits.match[s].weight.T + exits.match[s].bias
        for name, x in (("embeddings", e), ("match", p)):
            torch.testing.assert_close(found[name][:, s], x / x.norm(dim=1, keepdim=True), rtol=1e-5, atol=1e-6)

    # Nothing is detached: the aggregate trains gate, classifiers and features alike.
    reached = torch.autograd.grad(found["aggregate"].square().sum(), list(exits.parameters()), allow_unused=True)
    names = {n for (n, _), g in zip(exits.named_parameters(), reached, strict=True) if g is not None and g.any()}
    assert {n.split(".")[0] for n in names} == {"auxiliary", "gate"}


def test_what_the_outer_problem_learns() -> None:
    method = LMCL(LMCLOptions(), alike(2, C))
    exits = Exits(info("cifar_resnet8_b", C, 32), D)
    learned = {id(p) for p in method.outer(exits)}
    assert {name.split(".")[0] for name, p in exits.named_parameters() if id(p) in learned} == {"match"}
    assert len(learned) == 2 * 3
    assert not LMCL(LMCLOptions(meta_interval=None), alike(2, C)).outer(exits)


def test_exits_are_after_each_stage() -> None:
    assert list(LMCL.taps(LMCLOptions(), 3)) == [1, 2]
    with pytest.raises(ValueError, match=r"^lmcl has an exit after each stage but the last, found 1 stages$"):
        LMCL.taps(LMCLOptions(), 1)

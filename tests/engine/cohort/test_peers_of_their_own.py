"""What may differ from peer to peer in how they learn: rate, decay, and what of a network is frozen."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import models
from engine.config import ConfigError, RunConfig
from engine.preflight import check_run
from engine.ranks.collectives import Launch
from models.freezing import freeze
from tests.engine.stepping import cohort_of, config_of, do_steps
from tests.worlds import run_world

SMALL: dict[str, Any] = {"network": "cifar_resnet8_b", "options": {"width": 4}}


def of_each(config: RunConfig) -> dict[str, Any]:
    cohort = cohort_of(config)
    before = {r.name: {n: x.clone() for n, x in r.whole.state_dict().items()} for r in cohort.residents.values()}
    groups = {r.name: dict(r.optimizer.param_groups[0], params=None) for r in cohort.residents.values()}
    do_steps(cohort, [0, 1])
    moved = {
        r.name: [n for n, x in r.whole.state_dict().items() if not torch.equal(x, before[r.name][n])]
        for r in cohort.residents.values()
    }
    return {name: (groups[name], moved[name]) for name in groups}


@pytest.mark.parametrize("ranks", [1, 2])
def test_a_peer_may_have_an_optimiser_of_its_own_and_frozen_parts(ranks: int) -> None:
    peers = [
        {
            **SMALL,
            "name": "own",
            "optimizer": {"lr": 0.01, "weight_decay": 0.0},
            "frozen": ["conv1", "bn1", "layer1.*"],
        },
        {**SMALL, "name": "usual"},
    ]
    found: dict[str, Any] = {}
    for rank in run_world(ranks, of_each, config_of(peers=peers)):
        found |= rank
    (own, moved), (usual, all_moved) = found["own"], found["usual"]
    assert (own["lr"], own["weight_decay"]) == (0.01, 0.0)
    assert (usual["lr"], usual["weight_decay"]) == (0.05, 5e-4)
    # Neither weights nor running statistics of what is frozen move; all else does.
    frozen = ("conv1.", "bn1.", "layer1.")
    assert not [name for name in moved if name.startswith(frozen)]
    assert set(moved) == {name for name in all_moved if not name.startswith(frozen)}


def test_frozen_normalisation_is_in_evaluation_whatever_the_network_is_set_to() -> None:
    network = models.create("cifar_resnet8_b", 10, 1, width=4)
    freeze(network, ["layer2.0.bn1"])
    frozen, free = network.get_submodule("layer2.0.bn1"), network.get_submodule("layer1.0.bn1")
    before = frozen.running_mean.clone(), free.running_mean.clone()
    network.train()(torch.randn(4, 1, 28, 28))
    assert torch.equal(frozen.running_mean, before[0])
    assert not torch.equal(free.running_mean, before[1])


@pytest.mark.parametrize(
    ("peer", "reason"),
    [
        ({"frozen": ["layr1"]}, r"^peers\.0\.frozen 'layr1': fits no parameter; nearest: layer1"),
        ({"frozen": ["*"]}, r"^peers\.0\.frozen \['\*'\]: nothing of the network is left to learn"),
        ({"optimizer": {"name": "sdg"}}, r"^peers\.0\.optimizer\.name = 'sdg': not one of timm's"),
        ({"optimizer": {"rate": 1.0}}, r"^peers\.0\.optimizer\.rate = 1\.0: unknown key"),
    ],
)
def test_mistakes_name_the_peer(peer: dict[str, Any], reason: str) -> None:
    with pytest.raises(ConfigError, match=reason):
        check_run(config_of(peers=[{**SMALL, **peer}, SMALL]), Launch(0, 0, 1))


def test_an_optimiser_of_another_name_starts_without_the_options_of_the_runs() -> None:
    config = config_of(
        peers=[{**SMALL, "optimizer": {"name": "adamw", "lr": 0.001}}, SMALL], optimizer={"options": {"dampening": 0.0}}
    )
    own, usual = (config.optimizer_of(peer) for peer in config.peers)
    assert (own.name, own.lr, own.options) == ("adamw", 0.001, {})
    assert (usual.name, usual.options) == ("sgd", {"dampening": 0.0})


def test_what_cannot_have_peers_of_their_own_is_refused() -> None:
    with pytest.raises(ConfigError, match="dcl mixes the peers' weights"):
        config_of({"name": "dcl"}, [{**SMALL, "frozen": ["conv1"]}, SMALL])
    with pytest.raises(ConfigError, match="looks ahead with one rate"):
        config_of({"name": "lmcl"}, [{**SMALL, "optimizer": {"lr": 0.01}}, SMALL])

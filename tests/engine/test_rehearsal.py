"""Every step that a GPU could be asked for, made without one: every method, every option that changes the path of a
step, every placement. What would mix devices or make the host wait is an error here."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

import models
from engine.config import RunConfig
from engine.config.loading import validate
from engine.ranks.planning.choosing import plan
from engine.rehearsal import META, Images, Rehearsal, RehearsalError, rehearse
from losses import METHODS, Method, MethodOptions

SMALL = Images(10, 3, 32, 512)
MEMORY = {"negatives": "memory", "num_negatives": 32, "positives": 2, "width": 8}

CASES: dict[str, dict[str, Any]] = {
    "independent": {"method": {"name": "independent"}},
    "dml": {"method": {"name": "dml"}},
    "dml, in turns": {"method": {"name": "dml", "order": "sequential"}},
    "dml, sum and temperature": {"method": {"name": "dml", "combine": "sum", "temperature": 2.0}},
    "dml, ensemble": {"method": {"name": "dml", "combine": "ensemble"}},
    "dml, averages": {"method": {"name": "dml"}, "train": {"ema_decay": 0.99}},
    "dml, clipped, in micro-batches": {"method": {"name": "dml"}, "train": {"clip_norm": 1.0, "accumulation": 2}},
    "dml, bf16": {"method": {"name": "dml"}, "precision": {"amp": "bf16"}, "placement": {"exchange_dtype": "bf16"}},
    "dml, fp16": {"method": {"name": "dml"}, "precision": {"amp": "fp16"}},
    "dml, a view each": {"method": {"name": "dml"}, "data": {"views": "per_peer"}},
    "dml, adamw": {"method": {"name": "dml"}, "optimizer": {"name": "adamw"}},
    "cl_ilr": {"method": {"name": "cl_ilr"}},
    "one": {"method": {"name": "one"}},
    "ffl": {"method": {"name": "ffl"}},
    "okddip": {"method": {"name": "okddip"}, "peers": 4},
    "okddip, networks": {"method": {"name": "okddip", "form": "network"}, "peers": 4},
    **{
        f"kdcl, {ensemble}": {
            "method": {"name": "kdcl", "ensemble": ensemble},
            "data": {"held_out": 0.1} if ensemble == "general" else {},
        }
        for ensemble in ("naive", "linear", "minlogit", "general", "mean")
    },
    "pcl": {"method": {"name": "pcl"}, "data": {"views": "per_peer"}},
    "dcm": {"method": {"name": "dcm"}},
    "dcl": {"method": {"name": "dcl", "interval": 1}},
    "dcl, mean": {"method": {"name": "dcl", "interval": 1, "combine": "mean"}},
    "codistillation": {"method": {"name": "codistillation", "interval": 1}},
    "codistillation, bf16": {"method": {"name": "codistillation", "interval": 1, "wire": "bf16"}},
    "mcl, batch": {"method": {"name": "mcl", "negatives": "batch", "width": 8}},
    "mcl, global": {"method": {"name": "mcl", "negatives": "global", "width": 8}},
    "mcl, memory": {"method": {"name": "mcl", **MEMORY}},
    "mcl, shared negatives": {"method": {"name": "mcl", **MEMORY, "shared_negatives": True}},
    "mcl, a shared trunk": {"method": {"name": "mcl", "width": 8, "shared_stages": 1}},
    "mcl, logits too": {"method": {"name": "mcl", "width": 8, "logit_distill": "all"}},
    "lmcl": {"method": {"name": "lmcl", "width": 8, "meta_interval": None}},
    "lmcl, memory": {"method": {"name": "lmcl", **MEMORY, "meta_interval": None}},
}
"""With how many peers (2) and what else differs from a small run on batches of 16."""

PLACES = {
    "colocated, 1 rank": ("colocated", 1, 1),
    "colocated, 2 ranks": ("colocated", 1, 2),
    "spread": ("spread", 1, None),
    "spread, 2 replicas": ("spread", 2, None),
    "hybrid, 4 peers on 2 ranks": ("hybrid", 1, 2),
    "hybrid, 4 peers on 8 ranks": ("hybrid", 4, 8),
}


def config_of(case: dict[str, Any], kind: str = "colocated", peers: int | None = None) -> RunConfig:
    count = peers or case.get("peers", 2)
    placement = {"kind": kind} | ({"peers_per_rank": 2} if kind == "hybrid" else {})
    raw: dict[str, Any] = {
        "name": "rehearsal",
        "peers": [{"network": "cifar_resnet8_b", "copies": count, "options": {"width": 4}}],
        "data": {"dataset": "cifar10", "root": "nowhere", "global_batch": 16},
        "train": {"epochs": 2},
        "placement": placement,
    }
    for key, section in case.items():
        if key != "peers":
            raw[key] = {**raw.get(key, {}), **section}
    return validate(raw)


def rehearsed(config: RunConfig, world: int = 1, rank: int | None = None, **how: Any) -> Rehearsal:
    placement = plan(config, world, world - 1 if rank is None else rank)
    return rehearse(config, placement, how.pop("images", SMALL), **how)


@pytest.mark.parametrize("case", ["dml, clipped, in micro-batches", "dml, bf16", "kdcl, linear", "dcm", "mcl, memory"])
def test_peers_computed_as_one_mix_no_devices_and_the_host_never_waits(case: str) -> None:
    train = {**CASES[case].get("train", {}), "batch_peers": "on"}
    assert rehearsed(config_of({**CASES[case], "train": train}), steps=(0,)).waits == ()


OFTEN = ("colocated, 1 rank", "spread", "hybrid, 4 peers on 2 ranks")
"""Places that every case is tried in each time; a few cases in all."""
EVERYWHERE = ("independent", "dml", "one", "mcl, global", "pcl")


@pytest.mark.parametrize(
    ("case", "place"),
    [
        pytest.param(case, place, marks=[] if place in OFTEN or case in EVERYWHERE else pytest.mark.slow)
        for case in CASES
        for place in PLACES
    ],
)
def test_a_step_mixes_no_devices_and_the_host_never_waits(case: str, place: str) -> None:
    kind, replicas, world = PLACES[place]
    config = config_of(CASES[case], kind, 4 if kind == "hybrid" else None)
    found = rehearsed(config, world or replicas * len(config.cohort), steps=(0,))
    assert found.waits == ()
    assert found.memory.total > 0


@pytest.mark.parametrize("rank", [0, 2])
@pytest.mark.parametrize(
    "case", [pytest.param(case, marks=[] if case in EVERYWHERE else pytest.mark.slow) for case in CASES]
)
def test_a_step_where_ranks_are_uneven_is_like_any_other(case: str, rank: int) -> None:
    config = config_of(CASES[case], "balanced")
    names = [name for name, _ in config.cohort]
    ranks = {name: 2 if name == names[-1] else 1 for name in names}
    given = config.placement.model_copy(update={"ranks": ranks})
    found = rehearsed(config.model_copy(update={"placement": given}), len(names) + 1, rank, steps=(0,))
    assert found.waits == ()
    assert found.memory.total > 0


@pytest.mark.parametrize("sharded", [False, True])
@pytest.mark.parametrize("world", [1, 2])
def test_an_outer_step_waits_for_nothing_but_sharded_banks(world: int, sharded: bool) -> None:
    """Its optimiser's momentum lay on the CPU, as it was made before the head had been moved to the device."""
    case = {"method": {"name": "lmcl", **MEMORY, "meta_interval": 1, "inner_steps": 1, "bank_sharded": sharded}}
    found = rehearsed(config_of(case, "spread" if world > 1 else "colocated"), world, steps=(0,))
    assert all("bank_sharded" in wait for wait in found.waits)
    assert len(found.waits) == sharded


def test_peers_that_differ_tell_each_other_what_they_show() -> None:
    raw = config_of({"method": {"name": "lmcl", "width": 8, "meta_interval": None}}).model_dump(mode="json")
    raw["peers"] = [{"network": "cifar_resnet8_b"}, {"network": "cifar_wrn_16_2"}]
    raw["placement"] = {"kind": "spread"}
    for rank in (0, 1):
        assert rehearsed(validate(raw), 2, rank, steps=(0,)).waits == ()


def test_an_optimiser_that_is_not_fused_makes_the_host_wait() -> None:
    found = rehearsed(config_of({"method": {"name": "dml"}, "optimizer": {"name": "lamb"}}))
    assert found.waits == ("optimizer.name = lamb: is not fused, so each update waits for its flag",)


# -- memory -----------------------------------------------------------------------------------------------------------


def test_weights_gradients_and_momenta_are_counted_to_the_byte() -> None:
    config = config_of({"method": {"name": "independent"}})
    memory = rehearsed(config).memory
    with torch.device(META):
        network = _network(config)
    parameters = sum(p.numel() for p in network.parameters())
    statistics = sum(b.numel() * b.element_size() for b in network.buffers())
    assert memory.weights == 2 * (4 * parameters + statistics)
    assert memory.gradients == memory.optimizer == 2 * 4 * parameters
    assert memory.averages == memory.tables == memory.exchange == 0


def _network(config: RunConfig) -> nn.Module:
    peer = config.cohort[0][1]
    return models.create(peer.network, SMALL.num_classes, SMALL.channels, **peer.options)


def test_banks_averages_and_what_is_exchanged_are_counted_to_the_byte() -> None:
    config = config_of({"method": {"name": "mcl", **MEMORY}, "train": {"ema_decay": 0.9}}, "spread")
    found = rehearsed(config, 2).memory
    assert found.tables == 2 * SMALL.count * 8 * 4  # K banks of n rows of d float32
    plain = rehearsed(config_of({"method": {"name": "dml"}, "train": {"ema_decay": 0.9}}, "spread"), 2).memory
    assert plain.averages == plain.weights


def test_what_is_exchanged_is_what_travels() -> None:
    """16 rows of 10 logits in float32, packed, and those of two peers that come back."""
    found = rehearsed(config_of({"method": {"name": "dml"}}, "spread"), 2).memory
    assert found.exchange == (1 + 2) * 16 * 10 * 4


def test_activations_grow_with_the_batch_and_shrink_with_the_number_format() -> None:
    def activations(batch: int, amp: str) -> int:
        case = {"method": {"name": "dml"}, "precision": {"amp": amp}, "data": {"global_batch": batch}}
        return rehearsed(config_of(case)).memory.activations

    one, two, half = activations(64, "float32"), activations(128, "float32"), activations(128, "bf16")
    assert two == pytest.approx(2 * one, rel=0.05)
    assert 0.4 * two < half < 0.75 * two


# -- what it finds ----------------------------------------------------------------------------------------------------


class _Waits(Method):
    name = "waits"
    Options = MethodOptions

    def forward(self, residents: Any, signals: Any, targets: Any, progress: Any) -> Any:
        scale = 2.0 if signals[0]["logits"].mean() > 0 else 1.0
        return {(k, "ce"): scale * signals[k]["logits"].mean() for k in residents}


class _Mixes(Method):
    name = "mixes"
    Options = MethodOptions

    def forward(self, residents: Any, signals: Any, targets: Any, progress: Any) -> Any:
        weight = torch.ones(SMALL.num_classes, 1)
        return {(k, "ce"): (signals[k]["logits"] @ weight).mean() for k in residents}


class _Copies(Method):
    name = "copies"
    Options = MethodOptions

    def forward(self, residents: Any, signals: Any, targets: Any, progress: Any) -> Any:
        logits = signals[residents[0]]["logits"]
        weight = torch.ones(SMALL.num_classes).to(logits.device)
        half = torch.tensor(0.5, device=logits.device)
        return {(k, "ce"): (signals[k]["logits"] * weight * half).mean() for k in residents}


@pytest.fixture
def made_up(monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest) -> RunConfig:
    """A run of a method of this file, which is known as long as the test lasts."""
    method: type[Method] = request.param
    monkeypatch.setitem(METHODS, method.name, method)
    return config_of({"method": {"name": "independent"}}).model_copy(update={"method": MethodOptions(name=method.name)})


@pytest.mark.parametrize("made_up", [_Waits, _Mixes], indirect=True)
def test_what_asks_for_a_number_or_mixes_devices_is_named_with_its_line(made_up: RunConfig) -> None:
    with pytest.raises(RehearsalError, match=r"test_rehearsal\.py:\d+ \(.*(scale|weight).*\)"):
        rehearsed(made_up)


@pytest.mark.parametrize("made_up", [_Copies], indirect=True)
def test_what_is_sent_to_the_device_in_a_step_is_named(made_up: RunConfig) -> None:
    found = rehearsed(made_up)
    assert len(found.waits) == 2
    assert "torch.ones" in found.waits[0]
    assert "torch.tensor" in found.waits[1]


def test_the_world_that_is_not_there_is_gone_afterwards() -> None:
    rehearsed(config_of({"method": {"name": "dml"}}, "spread"), 2)
    assert not torch.distributed.is_initialized()

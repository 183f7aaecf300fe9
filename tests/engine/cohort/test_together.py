"""Peers of one network computed as one: the same numbers, 1/K of the operations, and a choice that a run keeps."""

from __future__ import annotations

import os
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from engine.cohort.cohort import Cohort
from engine.cohort.together import hindrance
from engine.config import ConfigError
from engine.preflight import check_run
from engine.ranks.collectives import Launch
from engine.ranks.planning.choosing import plan
from engine.training.batching import FILE, settle_batching
from launch.bench.host import computing_operations
from losses import Progress
from tests.engine.stepping import cohort_in_double, cohort_of, config_of, do_steps, optimizer_state, state
from tests.marks import slow
from tests.runs import small_run, train_here, weights
from tests.worlds import run_ranks, run_world

NARROW = {"network": "cifar_resnet8_b", "options": {"width": 4}}
WIDE = {"network": "cifar_resnet8_b", "options": {"width": 8}}
RUNS: dict[str, tuple[dict[str, Any], Any, dict[str, Any]]] = {
    "dml": ({"name": "dml"}, 3, {}),
    "views, micro-batches, frozen parts": (
        {"name": "kdcl"},
        [{**NARROW, "copies": 2, "frozen": ["conv1", "bn1"]}],
        {"data": {"views": "per_peer"}, "train": {"accumulation": 2}},
    ),
    "heads on stages": ({"name": "dcm"}, 2, {}),
    "an outer step": ({"name": "lmcl", "meta_interval": 2, "negatives": "batch"}, 2, {}),
    "averages and copies": ({"name": "codistillation", "interval": 2}, 2, {"train": {"ema_decay": 0.9}}),
    "a peer of its own": ({"name": "mcl"}, [{**NARROW, "copies": 2}, WIDE], {}),
    "two groups, clipped": (
        {"name": "dml"},
        [{**NARROW, "copies": 2}, {**WIDE, "copies": 2}],
        {"train": {"clip_norm": 0.1}},
    ),
}


def both_ways(name: str) -> list[dict[str, Tensor]]:
    """States and averages after six steps, each peer by itself and together, in float64."""
    method, peers, sections = RUNS[name]
    found = []
    for way in ("off", "on"):
        train = {**sections.get("train", {}), "batch_peers": way}
        cohort = cohort_in_double(config_of(method, peers, **{**sections, "train": train}))
        assert (cohort.together is not None) == (way == "on")
        do_steps(cohort, range(6))
        averages = [net.state_dict() for net in cohort.networks(ema=True).values()]
        kept = {f"average {k}/{n}": x for k, of_peer in enumerate(averages) for n, x in of_peer.items()}
        found.append({**state(cohort), **optimizer_state(cohort), **kept})
    return found


@pytest.mark.parametrize("name", RUNS)
def test_the_numbers_are_those_of_each_peer_by_itself(name: str) -> None:
    """Weights, BatchNorm's statistics and counters, momentum, averages."""
    [[alone, together]] = run_world(1, both_ways, name)
    assert alone.keys() == together.keys()
    for key, x in alone.items():
        torch.testing.assert_close(together[key], x, rtol=1e-10, atol=1e-12, msg=lambda text, key=key: f"{key}: {text}")


def counted(num_peers: int) -> tuple[int, int]:
    found = []
    for way in ("off", "on"):
        config = config_of({"name": "independent"}, num_peers, train={"batch_peers": way})
        cohort = cohort_of(config)
        do_steps(cohort, [0, 1])
        found.append(computing_operations(partial(do_steps, cohort, [2])))
    return found[0], found[1]


def test_operations_fall_towards_those_of_one_peer() -> None:
    alone = {k: run_world(1, counted, k)[0] for k in (2, 8)}
    assert alone[2][1] < 0.75 * alone[2][0]
    assert alone[8][1] < 0.35 * alone[8][0]


@pytest.mark.parametrize(
    ("method", "peers", "sections", "reason"),
    [
        ({"name": "one"}, 2, {}, "the peers of one are branches of one network"),
        ({"name": "dml", "order": "sequential"}, 2, {}, "the peers are updated one after another"),
        (
            {"name": "dml"},
            [NARROW, WIDE],
            {},
            "no rank has two peers that learn and have the same network, options",
        ),
        ({"name": "dml"}, 2, {"precision": {"compile": True}}, "precision.compile compiles the peers one by one"),
    ],
)
def test_what_cannot_be_computed_together_is_refused(
    method: dict[str, Any], peers: Any, sections: dict[str, Any], reason: str
) -> None:
    config = config_of(method, peers, train={"batch_peers": "on"}, **sections)
    with pytest.raises(ConfigError, match=f"^train.batch_peers = on: {reason}.*; expected off or auto$"):
        check_run(config, Launch(0, 0, 1))


FOUR = [{**NARROW, "copies": 3, "name": "n"}, {**WIDE, "name": "w"}]
PLACES: dict[str, tuple[int, dict[str, Any], Any, dict[str, Any]]] = {
    "colocated": (2, {"kind": "colocated"}, 3, {}),
    "colocated, a peer of its own, uneven rows, micro-batches": (
        3,
        {"kind": "colocated"},
        FOUR,
        {"data": {"global_batch": 22}, "train": {"accumulation": 2}},
    ),
    "hybrid": (2, {"kind": "hybrid", "peers_per_rank": 2}, 4, {}),
    "hybrid over 2 replicas, interleaved": (
        4,
        {"kind": "hybrid", "peers_per_rank": 2, "order": "interleaved"},
        4,
        {"data": {"views": "per_peer"}},
    ),
    "balanced, one rank with a single peer": (2, {"kind": "balanced"}, [{**NARROW, "copies": 2}, WIDE], {}),
}
SEVERAL = [
    ("dml", "colocated"),
    ("dml", "hybrid over 2 replicas, interleaved"),
    ("dml", "balanced, one rank with a single peer"),
    slow("dml", "hybrid"),
    slow("dml", "colocated, a peer of its own, uneven rows, micro-batches"),
    slow("lmcl", "colocated"),
    ("dcm", "hybrid over 2 replicas, interleaved"),
    ("mcl", "colocated, a peer of its own, uneven rows, micro-batches"),
]


def on_several_ranks(name: str, place: str) -> list[dict[str, Tensor]]:
    _, placement, peers, sections = PLACES[place]
    method = {"name": name, **({"meta_interval": 2, "replicas": "published"} if name == "lmcl" else {})}
    found = []
    for way in ("off", "on"):
        train = {**sections.get("train", {}), "batch_peers": way}
        cohort = cohort_in_double(config_of(method, peers, **{**sections, "train": train, "placement": placement}))
        do_steps(cohort, range(4))
        found.append(
            {**state(cohort), **optimizer_state(cohort), "together": torch.tensor(cohort.together is not None)}
        )
    return found


@pytest.mark.parametrize(("name", "place"), SEVERAL)
def test_the_numbers_are_the_same_on_several_ranks(name: str, place: str) -> None:
    """Weights on all ranks, where they average gradients and where they do not."""
    ranks = run_world(PLACES[place][0], on_several_ranks, name, place)
    assert any(together["together"] for _, together in ranks)
    for alone, together in ranks:
        assert not alone.pop("together")
        del together["together"]
        assert alone.keys() == together.keys()
        for key, x in alone.items():
            torch.testing.assert_close(together[key], x, rtol=1e-10, atol=1e-12, msg=lambda t, key=key: f"{key}: {t}")


def test_ranks_with_a_peer_each_are_refused() -> None:
    config = config_of(train={"batch_peers": "on"})
    reason = "no rank has two peers that learn and have the same network, options and frozen parts"
    assert hindrance(config, plan(config, 1, 0)) is None
    for world in (2, 4):
        assert hindrance(config, plan(config, world, 0)) == reason


def with_dropout(folder: Path, way: str) -> list[str]:
    peers = [{"network": "timm/test_convnext", "options": {"drop_path_rate": 0.2}, "copies": 2}]
    cohort = cohort_of(config_of({"name": "dml"}, peers, train={"batch_peers": way}), channels=3)
    said: list[str] = []
    settle_batching(cohort, Progress(0, 5, 2), folder, said.append, going_on=False)
    return said


def test_networks_that_draw_random_numbers_stay_apart(tmp_path: Path) -> None:
    reason = "ConvNeXt: it draws random numbers, such as dropout, and each peer draws its own"
    [said] = run_world(1, with_dropout, tmp_path, "auto")
    assert said == [f"train.batch_peers = auto: each peer by itself, since {reason}"]
    with pytest.raises(RuntimeError, match=f"train.batch_peers = on: {reason}"):
        run_world(1, with_dropout, tmp_path, "on")


def with_dropout_on_rank_1(folder: Path, way: str) -> list[str]:
    random = {"network": "cifar_wrn_10_1", "options": {"dropout": 0.2}, "copies": 2}
    config = config_of({"name": "dml"}, [{**NARROW, "copies": 2}, random], train={"batch_peers": way})
    said: list[str] = []
    settle_batching(cohort_of(config), Progress(0, 5, 2), folder, said.append, going_on=False)
    return said


def test_ranks_choose_alike(tmp_path: Path) -> None:
    reason = "WideResNet: it draws random numbers, such as dropout, and each peer draws its own"
    for said in run_world(2, with_dropout_on_rank_1, tmp_path, "auto"):
        assert said == [f"train.batch_peers = auto: each peer by itself, since {reason}"]
    with pytest.raises(RuntimeError, match=f"train.batch_peers = on: {reason}"):
        run_world(2, with_dropout_on_rank_1, tmp_path, "on")
    ranks = run_world(2, choosing, tmp_path)
    assert ranks[0] == ranks[1]
    untouched, _, chosen = ranks[0]
    assert untouched
    assert chosen == [chosen[0], chosen[0], not chosen[0], False]


def choosing(folder: Path) -> tuple[bool, list[str], list[bool]]:
    """Whether a measurement leaves everything as it was; what is said and chosen by a run that begins, by one that goes
    on, by one that goes on where the file says the opposite, and by one that has begun without a choice."""
    train = {"batch_peers": "auto", "ema_decay": 0.9}
    config = config_of({"name": "dml"}, train=train, placement={"kind": "colocated"})
    cohort, said, chosen = cohort_of(config), [], []
    do_steps(cohort, [0])
    before = {**state(cohort), **optimizer_state(cohort), "random": torch.get_rng_state()}

    def settled(cohort: Cohort, *, going_on: bool) -> None:
        settle_batching(cohort, Progress(1, 5, 2), folder, said.append, going_on=going_on)
        chosen.append(cohort.together is not None)

    settled(cohort, going_on=False)
    after = {**state(cohort), **optimizer_state(cohort), "random": torch.get_rng_state()}
    untouched = all(torch.equal(x, after[name]) for name, x in before.items())
    settled(cohort_of(config), going_on=True)
    path, first = folder / FILE, dist.get_rank() == 0
    if first:
        text = path.read_text()
        path.write_text(text.replace("true", "x").replace("false", "true").replace("x", "false"))
    settled(cohort_of(config), going_on=True)
    if first:
        path.unlink()
    settled(cohort_of(config), going_on=True)
    return untouched, said, chosen


def test_auto_measures_once_keeps_its_choice_and_changes_nothing(tmp_path: Path) -> None:
    [(untouched, said, chosen)] = run_world(1, choosing, tmp_path)
    assert untouched
    assert "forward and backward take" in said[0]
    assert said[1] == said[0]
    assert chosen == [chosen[0], chosen[0], not chosen[0], False]
    assert said[3] == "train.batch_peers = auto: each peer by itself: the run has begun that way"


def going_on(folder: Path) -> None:
    config = config_of({"name": "dml"}, train={"batch_peers": "auto"})
    settle_batching(cohort_of(config), Progress(1, 5, 2), folder, print, going_on=True)


@pytest.mark.parametrize("kind", ["pipe", "link", "half"])
def test_what_is_no_choice_is_named(tmp_path: Path, kind: str) -> None:
    path = tmp_path / FILE
    if kind == "pipe":
        os.mkfifo(path)
    elif kind == "link":
        (tmp_path / "elsewhere").write_text('{"device": "cpu", "together": true, "why": ""}')
        path.symlink_to(tmp_path / "elsewhere")
    else:
        path.write_text('{"device": "cpu", "toge')
    with pytest.raises(RuntimeError, match=f"{path}: not what train.batch_peers = auto has chosen"):
        run_world(1, going_on, tmp_path)


@pytest.mark.parametrize("ranks", [slow(1), 3])
def test_a_run_that_is_interrupted_ends_bit_equal(tiny: Path, tmp_path: Path, ranks: int) -> None:
    """The sum over three ranks rounds differently in another layout of DDP's."""
    train = {"batch_peers": "auto"}
    for folder, epochs in (("whole", 2), ("parts", 1), ("parts", 2)):
        sections = {"train": {**train, "epochs": epochs}, "schedule": {"name": "constant"}}
        sections["placement"] = {"kind": "colocated"}
        (tmp_path / folder).mkdir(exist_ok=True)
        # Were it measured, it could be chosen one way here and another way there.
        (tmp_path / folder / FILE).write_text('{"device": "cpu", "together": true, "why": "it is meant"}')
        run_ranks(ranks, train_here, small_run(tiny, tmp_path / folder, **sections))
    whole, parts = weights(tmp_path / "whole"), weights(tmp_path / "parts")
    assert whole
    assert all(torch.equal(x, parts[name]) for name, x in whole.items())

"""Updates on tensors that stay where they are: on a CPU all of a captured update but the capture itself."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from engine.config import ConfigError
from engine.preflight import check_run
from engine.ranks.collectives import Launch
from engine.training.graphs import WARM_RANKS, Graphed
from engine.training.step import train_step
from engine.training.timing import Clock
from losses import Progress
from tests.engine.stepping import CPU, batches, cohort_of, config_of, numbers_of, optimizer_state, state
from tests.marks import often
from tests.worlds import run_world

RUNS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "dml, a ramp, a falling rate, micro-batches": (
        {"name": "dml", "ramp": 2},
        {"train": {"accumulation": 2, "ema_decay": 0.9}, "schedule": {"name": "cosine"}},
    ),
    "kdcl, adamw, clipped": (
        {"name": "kdcl"},
        {"optimizer": {"name": "adamw", "lr": 0.001}, "train": {"clip_norm": 0.5}, "schedule": {"name": "cosine"}},
    ),
    "dcl, together": ({"name": "dcl", "interval": 2}, {"train": {"batch_peers": "on"}}),
    "an outer step": ({"name": "lmcl", "meta_interval": 2, "negatives": "batch"}, {}),
    "a trunk": ({"name": "one"}, {}),
}


def steps(cohort: Any, updater: Graphed | None, spoiled: int, count: int = 7) -> dict[Any, Any]:
    """State, and what is told of each step; the images of one are spoiled, so that its update is skipped."""

    def spoil(step: int, rank: int, images: Tensor) -> None:
        if step == spoiled:
            images.fill_(torch.inf)

    stop, told = torch.zeros(1), []
    for step, pieces in batches(cohort, range(count), spoil=spoil):
        stop.fill_(3.0 * (step == 5))
        outcome = train_step(cohort, pieces, Progress(step, 5, 2), Clock(CPU), stop, updater)
        told.append((str(numbers_of(outcome)), outcome.skipped.item(), outcome.stop.item()))
    rates = [group["lr"] for optimizer in cohort.optimizers() for group in optimizer.param_groups]
    assert all(isinstance(rate, float) for rate in rates)
    return {**state(cohort), **optimizer_state(cohort), "told": told, "rates": rates}


def both(name: str) -> list[dict[Any, Any]]:
    method, sections = RUNS[name]
    found, said = [], []
    for updater in (None, Graphed(said.append)):
        found.append(steps(cohort_of(config_of(method, 2, **sections)), updater, spoiled=3))
    assert not said
    return found


@pytest.mark.parametrize("name", RUNS)
def test_updates_on_static_tensors_are_the_same_bits(name: str) -> None:
    [[plain, static]] = run_world(1, both, name)
    assert [skipped for _, skipped, _ in plain["told"]] == [0, 0, 0, 1, 0, 0, 0]
    assert [stop for _, _, stop in plain["told"]] == [0, 0, 0, 0, 0, 3, 0]
    assert plain["told"] == static["told"]
    assert plain["rates"] == static["rates"]
    for key, x in plain.items():
        if isinstance(x, Tensor):
            torch.testing.assert_close(static[key], x, rtol=0, atol=0, equal_nan=True, msg=key)


def with_dropout() -> list[str]:
    peers = [{"network": "cifar_wrn_10_1", "options": {"dropout": 0.2}, "copies": 2}]
    cohort, said = cohort_of(config_of({"name": "dml"}, peers)), []
    steps(cohort, Graphed(said.append), spoiled=-1)
    return said


def test_random_numbers_are_noticed_and_said_once() -> None:
    [said] = run_world(1, with_dropout)
    reason = "networks or the method draw random numbers in it, such as dropout"
    assert said == [
        f"precision.graphs = on: updates are not captured, but launched one operation after another: {reason}"
    ]


@pytest.mark.parametrize(
    ("method", "sections", "reason"),
    [
        ({"name": "dml"}, {"precision": {"amp": "fp16"}}, "precision.amp = fp16 has the host decide by the loss scale"),
        ({"name": "dml"}, {"optimizer": {"name": "lamb"}}, "the host waits for optimizer.name = lamb in every update"),
        ({"name": "mcl", "negatives": "memory"}, {}, "method.negatives = memory draws by the number of the step"),
        ({"name": "codistillation"}, {}, "codistillation looks at other networks from some step on"),
    ],
)
def test_what_cannot_be_captured_is_refused(method: dict[str, Any], sections: dict[str, Any], reason: str) -> None:
    precision = {**sections.get("precision", {}), "graphs": "on"}
    config = config_of(method, **{**sections, "precision": precision})
    with pytest.raises(ConfigError, match=f"^precision.graphs = on: {reason}.*; expected off$"):
        check_run(config, Launch(0, 0, 1))


PLACES: dict[str, tuple[int, Any, dict[str, Any]]] = {
    "colocated": (2, 2, {"placement": {"kind": "colocated"}}),
    "spread over 2 replicas": (4, 2, {"placement": {"kind": "spread"}}),
    "hybrid, together": (2, 4, {"placement": {"kind": "hybrid", "peers_per_rank": 2}, "train": {"batch_peers": "on"}}),
    "balanced": (3, 2, {"placement": {"kind": "balanced"}, "data": {"global_batch": 17}}),
}


def both_on_ranks(place: str) -> list[dict[Any, Any]]:
    _, peers, sections = PLACES[place]
    found, said = [], []
    for updater in (None, Graphed(said.append)):
        cohort = cohort_of(config_of({"name": "dml"}, peers, **sections))
        found.append(steps(cohort, updater, spoiled=3, count=WARM_RANKS + 2))
    assert not said
    return found


@pytest.mark.parametrize("place", often(PLACES, "spread over 2 replicas", "hybrid, together"))
def test_updates_on_several_ranks_are_the_same_bits(place: str) -> None:
    for plain, static in run_world(PLACES[place][0], both_on_ranks, place):
        assert plain["told"] == static["told"]
        for key, x in plain.items():
            if isinstance(x, Tensor):
                torch.testing.assert_close(static[key], x, rtol=0, atol=0, equal_nan=True, msg=key)


def with_dropout_on_rank_1() -> list[str]:
    peers = [
        {"network": "cifar_resnet8_b", "options": {"width": 4}},
        {"network": "cifar_wrn_10_1", "options": {"dropout": 0.2}},
    ]
    cohort, said = cohort_of(config_of({"name": "dml"}, peers, placement={"kind": "spread"})), []
    steps(cohort, Graphed(said.append), spoiled=-1, count=WARM_RANKS + 2)
    return said


def test_what_hinders_one_rank_hinders_all() -> None:
    reason = "networks or the method draw random numbers in it, such as dropout"
    for said in run_world(2, with_dropout_on_rank_1):
        assert said == [
            f"precision.graphs = on: updates are not captured, but launched one operation after another: {reason}"
        ]

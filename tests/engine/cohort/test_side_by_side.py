"""Peers that are computed at the same time, a thread each, become what they become one after another."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from engine.config import ConfigError
from engine.preflight import check_run
from engine.ranks.collectives import Launch
from tests.engine.stepping import cohort_of, config_of, do_steps, train_states
from tests.worlds import run_world

FORMS: dict[str, dict[str, Any]] = {
    "independent": {"method": {"name": "independent"}},
    "dml": {"method": {"name": "dml"}, "train": {"accumulation": 2}},
    "kdcl": {"method": {"name": "kdcl"}, "data": {"views": "per_peer"}},
    "dcm": {"method": {"name": "dcm"}},
    "dcl": {"method": {"name": "dcl", "interval": 2}},
    "codistillation": {"method": {"name": "codistillation", "interval": 1}},
    "mcl": {"method": {"name": "mcl"}},
    "lmcl": {"method": {"name": "lmcl", "meta_interval": 2}},
}


def trained(threads: int) -> dict[str, dict[str, Tensor]]:
    """Everything of each form after three steps. All kernels have one thread here, so that nothing rounds otherwise."""
    found = {}
    for name, sections in FORMS.items():
        sections = {**sections, "train": {**sections.get("train", {}), "peer_threads": threads}}
        found[name] = train_states(config_of(sections.pop("method"), 3 if name == "dml" else 2, **sections), 3)
    return found


def test_threads_change_nothing() -> None:
    [one_after_another] = run_world(1, trained, 1)
    [side_by_side] = run_world(1, trained, 2)
    for name, expected in one_after_another.items():
        # Several gradients of an embedding are added up in another order where they end at it.
        within = 1e-5 if "mcl" in name else 0.0
        for tensor, x in expected.items():
            apart = x.double() - side_by_side[name][tensor].double()
            assert apart.norm() <= within * x.double().norm(), f"{name}: {tensor}"


def beside_each_other(network: dict[str, Any]) -> tuple[int, list[int]]:
    cohort = cohort_of(config_of(peers=[{**network, "copies": 2}], train={"peer_threads": 2}))
    side_by_side = cohort.side_by_side
    assert side_by_side is not None
    torch.set_num_threads(2)
    before = torch.get_num_threads()
    cores = list(side_by_side._pool.map(lambda _: torch.get_num_threads(), range(8)))
    do_steps(cohort, [0])
    return before, cores


def test_each_thread_has_one_core_and_the_others_keep_theirs() -> None:
    small = {"network": "cifar_resnet8_b", "options": {"width": 4}}
    assert run_world(1, beside_each_other, small) == [(2, [1] * 8)]


def test_networks_that_draw_random_numbers_are_refused() -> None:
    dropout = {"network": "cifar_wrn_10_1", "options": {"dropout": 0.3}}
    with pytest.raises(RuntimeError, match=r"train\.peer_threads: a network draws random numbers"):
        run_world(1, beside_each_other, dropout)


@pytest.mark.parametrize(
    ("sections", "reason"),
    [
        ({"method": {"name": "one"}}, "branches of one network"),
        ({"method": {"name": "dml", "order": "sequential"}}, "one after another"),
        ({"precision": {"compile": True}}, "compiles the peers one by one"),
        ({"train": {"batch_peers": "auto"}}, "computes peers as one"),
        ({"peers": 1, "method": {"name": "independent"}}, "there is one peer"),
    ],
)
def test_where_it_cannot_be_is_said_before_anything_starts(sections: dict[str, Any], reason: str) -> None:
    config = config_of(**{**sections, "train": {**sections.get("train", {}), "peer_threads": 2}})
    with pytest.raises(ConfigError, match=f"train.peer_threads = 2: .*{reason}"):
        check_run(config, Launch(0, 0, 1))

"""Promise 1 where ranks and rows are uneven, in double precision: every method's weights come out as on one rank.

BatchNorm uses fixed statistics, as it would otherwise see other rows on each number of ranks.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.modules.batchnorm import _BatchNorm

from engine.config import RunConfig
from tests.engine.stepping import cohort_in_double, config_of, do_steps, joined, state
from tests.marks import often, slow
from tests.worlds import run_world


def _trained(config: RunConfig, per_node: int | None = None) -> dict[str, Tensor]:
    """All that this rank holds after three steps."""
    cohort = cohort_in_double(config, per_node)
    averages = {k: r.ema.module for k, r in cohort.residents.items() if r.ema is not None}
    for module in (*(r.peer for r in cohort.residents.values()), *averages.values(), cohort.shared):
        for layer in module.modules():
            if isinstance(layer, _BatchNorm):
                layer.eval()
    do_steps(cohort, range(3))
    held = {
        f"average {k}/{name}": x.clone() for k, module in averages.items() for name, x in module.state_dict().items()
    }
    held |= {f"shared/{name}": x.clone() for name, x in cohort.shared.state_dict().items() if isinstance(x, Tensor)}
    return {name: x for name, x in (state(cohort) | held).items() if x.is_floating_point()}


def _peers(*widths: int) -> list[dict[str, Any]]:
    return [
        {"network": "cifar_resnet8_b", "name": f"p{i}", "options": {"width": width}} for i, width in enumerate(widths)
    ]


def _assert_equal_everywhere(
    method: dict[str, Any],
    peers: Sequence[dict[str, Any]],
    worlds: Sequence[tuple[int, dict[str, Any]]],
    per_node: int | None = None,
    **rest: Any,
) -> None:
    """Compares worlds, in nodes of `per_node` ranks, with one rank alone. What travels after a step, as in dcl, is
    rounded to float32 on its way."""
    limit = 1e-7 if method["name"] in ("dcl", "codistillation") else 1e-11
    [alone] = run_world(1, _trained, config_of(method, list(peers), placement={"kind": "colocated"}, **rest))
    for ranks, placement in worlds:
        placement = {"kind": "balanced", **placement}
        config = config_of(method, list(peers), placement=placement, **rest)
        found = joined(run_world(ranks, _trained, config, per_node))
        assert found.keys() == alone.keys()
        for name, x in alone.items():
            difference = (found[name] - x).norm() / x.norm().clamp_min(torch.finfo(torch.float64).tiny)
            assert difference <= limit, f"{ranks} ranks, {placement}: {name}: {difference:.1e}"


TWO = [(3, {"ranks": {"p0": 1, "p1": 2}}), (5, {"ranks": {"p0": 3, "p1": 2}, "order": "interleaved"})]
FOUR = [(3, {}), (7, {"ranks": {"p0": 1, "p1": 2, "p2": 1, "p3": 3}})]
MEMORY = {"negatives": "memory", "num_negatives": 20}

METHODS: dict[str, tuple[dict[str, Any], list[dict[str, Any]], Any]] = {
    "independent": ({"name": "independent"}, _peers(4, 8), TWO),
    "dml": ({"name": "dml"}, _peers(4, 8), TWO),
    "dml of four": ({"name": "dml"}, _peers(4, 8, 4, 6), FOUR),
    "dml, in turns": ({"name": "dml", "order": "sequential"}, _peers(4, 8), TWO),
    "kdcl": ({"name": "kdcl"}, _peers(4, 8), TWO),
    "kdcl, linear": ({"name": "kdcl", "ensemble": "linear"}, _peers(4, 8), TWO[:1]),
    "dcm": ({"name": "dcm"}, _peers(4, 8), TWO),
    "codistillation": ({"name": "codistillation", "burn_in": 1, "interval": 2}, _peers(4, 8), TWO),
    "dcl": ({"name": "dcl", "interval": 2}, _peers(4, 4), TWO),
    "one": ({"name": "one"}, _peers(4, 4), TWO),
    "ffl": ({"name": "ffl"}, _peers(4, 4), TWO),
    "pcl": ({"name": "pcl"}, _peers(4, 4), TWO),
    "cl_ilr": ({"name": "cl_ilr"}, _peers(4, 4), TWO),
    "okddip": ({"name": "okddip"}, _peers(4, 4, 4, 4), FOUR),
    "okddip, networks": ({"name": "okddip", "form": "network"}, _peers(4, 4, 8), [(5, {})]),
    "mcl": ({"name": "mcl"}, _peers(4, 8), TWO),
    "mcl, memory": ({"name": "mcl", "logit_distill": "all", **MEMORY}, _peers(4, 8), TWO),
    "mcl, memory in shards": ({"name": "mcl", "bank_sharded": True, **MEMORY}, _peers(4, 8), TWO),
    "lmcl": ({"name": "lmcl", "meta_interval": 2}, _peers(4, 8), TWO),
    "lmcl, memory": ({"name": "lmcl", "meta_interval": 1, **MEMORY}, _peers(4, 4), TWO[:1]),
}
OFTEN = ("dml of four", "dml, in turns", "kdcl", "dcm", "codistillation", "dcl", "ffl", "pcl", "mcl, memory", "lmcl")


@pytest.mark.parametrize("method", often(METHODS, *OFTEN))
def test_uneven_ranks_and_rows_change_no_number(method: str) -> None:
    options, peers, worlds = METHODS[method]
    _assert_equal_everywhere(options, peers, worlds[:1], data={"global_batch": 22 if "mcl" in method else 17})


@pytest.mark.slow
@pytest.mark.parametrize("method", METHODS)
def test_more_ranks_in_turn(method: str) -> None:
    options, peers, worlds = METHODS[method]
    _assert_equal_everywhere(options, peers, worlds[1:], data={"global_batch": 22 if "mcl" in method else 17})


WAYS: dict[str, Any] = {
    "in micro-batches": {"data": {"global_batch": 23}, "train": {"epochs": 2, "accumulation": 3}},
    "clipped": {"data": {"global_batch": 17}, "train": {"epochs": 2, "clip_norm": 0.05, "ema_decay": 0.9}},
    "a view each": {"data": {"global_batch": 17, "views": "per_peer"}},
}


@pytest.mark.parametrize("way", WAYS)
def test_whatever_else_is_asked_for(way: str) -> None:
    _assert_equal_everywhere({"name": "dml"}, _peers(4, 8, 4), [(5, {}), (2, {})], **WAYS[way])


def test_a_trunk_and_teachers_where_each_peer_has_a_view() -> None:
    _assert_equal_everywhere({"name": "pcl"}, _peers(4, 4, 4), [(2, {}), (5, {})], **WAYS["a view each"])


def test_even_placements_take_batches_that_do_not_divide() -> None:
    placements = [(2, {"kind": "colocated"}), (4, {"kind": "spread", "order": "interleaved"})]
    _assert_equal_everywhere({"name": "mcl"}, _peers(4, 8), placements, data={"global_batch": 21})
    _assert_equal_everywhere(
        {"name": "pcl"}, _peers(4, 4), placements, data={"global_batch": 23}, train={"epochs": 2, "accumulation": 2}
    )


IN_TWO = {"ranks": {"p0": 2, "p1": 1, "p2": 3}, "exchange": "hierarchical"}


@pytest.mark.parametrize(
    ("method", "rows"),
    [
        ({"name": "dml"}, 17),  # constants
        ({"name": "mcl"}, 22),  # everywhere, and gradients come back
        slow({"name": "lmcl", "meta_interval": 2}, 22),  # and their gradients too
    ],
)
def test_exchanges_in_two_levels_change_no_number(method: dict[str, Any], rows: int) -> None:
    """Three nodes of two ranks: (0, 0), (1, 2), (2, 2)."""
    _assert_equal_everywhere(method, _peers(4, 8, 4), [(6, IN_TWO)], per_node=2, data={"global_batch": rows})

"""A run that is killed in a balanced placement goes on in the same, bit for bit, and in any other.

Networks without BatchNorm, which would see other rows in each.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from engine.config import RunConfig
from tests.kills import assert_same_state, final_state, kill_after_step
from tests.marks import slow
from tests.runs import assert_same_weights, small_run, train_here, weights
from tests.worlds import run_ranks

PLACES: dict[str, tuple[int, dict[str, Any]]] = {
    "balanced": (3, {"kind": "balanced", "ranks": {"a": 1, "b": 2}}),
    "balanced otherwise": (5, {"kind": "balanced", "ranks": {"a": 2, "b": 3}, "order": "interleaved"}),
    "spread": (2, {"kind": "spread"}),
    "colocated": (1, {"kind": "colocated"}),
}


def _run(tiny: Path, folder: Path, place: str, method: dict[str, Any]) -> RunConfig:
    peers = [
        {"network": "timm/test_vit", "name": "a", "options": {"img_size": 28, "patch_size": 7}},
        {"network": "timm/test_vit2", "name": "b", "options": {"img_size": 28, "patch_size": 7}},
    ]
    return small_run(tiny, folder, method, peers, placement=PLACES[place][1], data={"global_batch": 23})


@pytest.mark.parametrize("after", ["balanced", slow("spread")])
def test_a_killed_run_goes_on(tiny: Path, tmp_path: Path, after: str) -> None:
    method = {"name": "dml"}
    ranks = PLACES["balanced"][0]
    run_ranks(ranks, train_here, _run(tiny, tmp_path / "whole", "balanced", method))
    folder = tmp_path / "killed"
    kill_after_step(ranks, _run(tiny, folder, "balanced", method), 5)
    run_ranks(PLACES[after][0], train_here, _run(tiny, folder, after, method))
    if after == "balanced":
        assert_same_state(final_state(folder), final_state(tmp_path / "whole"))
    assert_same_weights(weights(folder), weights(tmp_path / "whole"))


@pytest.mark.slow
@pytest.mark.parametrize("method", [{"name": "dml"}, {"name": "codistillation", "burn_in": 2, "interval": 3}])
def test_all_placements_end_alike(tiny: Path, tmp_path: Path, method: dict[str, Any]) -> None:
    for place, (ranks, _) in PLACES.items():
        run_ranks(ranks, train_here, _run(tiny, tmp_path / place, place, method))
    for place in PLACES:
        assert_same_weights(weights(tmp_path / place), weights(tmp_path / "colocated"))

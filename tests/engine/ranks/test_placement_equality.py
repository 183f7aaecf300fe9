"""Promise 1: placement changes the speed, never the numbers. Real gloo ranks, real images."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tests.marks import often, slow
from tests.runs import assert_same_weights, small_run, train_here, weights
from tests.worlds import run_ranks

METHODS: dict[str, dict[str, Any]] = {
    "independent": {"name": "independent"},
    "dml": {"name": "dml"},
    "dml_sum_T2": {"name": "dml", "combine": "sum", "temperature": 2.0, "weight": 0.5},
    "dml_sequential": {"name": "dml", "order": "sequential"},
    "dcm": {"name": "dcm"},
    "dcl": {"name": "dcl", "interval": 2, "beta": 0.5},
    "codistillation": {"name": "codistillation", "burn_in": 2, "interval": 3},
    "kdcl": {"name": "kdcl"},
}


@pytest.fixture(scope="module")
def trained(tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """Trains a cohort once for each (method, peers, ranks, placement) and gives its weights after 10 steps."""
    done: dict[Any, dict[str, Any]] = {}

    def train(method: str, peers: int, ranks: int, **placement: Any) -> dict[str, Any]:
        key = (method, peers, ranks, *placement.items())
        if key not in done:
            folder = tmp_path_factory.mktemp("run")
            run_ranks(ranks, train_here, small_run(tiny, folder, METHODS[method], peers, placement=placement))
            done[key] = weights(folder)
        return done[key]

    return train


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("peers", [slow(2), 3, slow(4)])
def test_spread_equals_colocated(trained: Any, method: str, peers: int) -> None:
    colocated = trained(method, peers, 1, kind="colocated")
    assert_same_weights(trained(method, peers, peers, kind="spread"), colocated)


@pytest.mark.parametrize("method", often(METHODS, "dml", "dml_sequential", "codistillation"))
def test_hybrid_equals_colocated(trained: Any, method: str) -> None:
    colocated = trained(method, 4, 1, kind="colocated")
    assert_same_weights(trained(method, 4, 2, kind="hybrid", peers_per_rank=2), colocated)


@pytest.mark.parametrize("method", often(METHODS, "dml", "dcm", "codistillation"))
def test_spread_over_replicas_equals_colocated_over_as_many(trained: Any, method: str) -> None:
    """Two replicas on either side, so that BatchNorm sees the same rows."""
    assert_same_weights(trained(method, 2, 4, kind="spread"), trained(method, 2, 2, kind="colocated"))


def test_methods_differ(trained: Any) -> None:
    """The equalities above would hold for a method that does nothing, too."""
    runs = [trained(method, 3, 1, kind="colocated") for method in METHODS]
    for i, one in enumerate(runs):
        for other in runs[:i]:
            with pytest.raises(AssertionError):
                assert_same_weights(one, other, 1e-3)

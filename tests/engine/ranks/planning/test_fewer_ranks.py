"""A balanced run that has lost a rank goes on on those that are left, in the next best placement, and says so."""

from __future__ import annotations

import contextlib
import io
import os
from pathlib import Path
from typing import Any

import pytest

from engine.config import RunConfig
from engine.reporting.tracking import read_metrics
from tests.runs import small_run, train_here
from tests.worlds import run_ranks


def train_elastic(config: RunConfig) -> str:
    """As under a torchrun that may start ranks anew, on as many as are left. Returns: what was said."""
    os.environ["TORCHELASTIC_MAX_RESTARTS"] = "3"
    with contextlib.redirect_stderr(io.StringIO()) as said:
        train_here(config)
    return said.getvalue()


@pytest.mark.parametrize("ranks", [None, {"large": 3, "small": 1}])
def test_a_run_goes_on_on_fewer_ranks(tiny: Path, tmp_path: Path, ranks: dict[str, int] | None) -> None:
    peers: list[dict[str, Any]] = [
        {"network": "cifar_resnet8_b", "name": "large", "options": {"width": 12}},
        {"network": "cifar_resnet8_b", "name": "small", "options": {"width": 4}},
    ]
    placement = {"kind": "balanced", "ranks": ranks}
    said = ""
    for world, epochs in ((4, 1), (3, 2)):
        config = small_run(tiny, tmp_path, peers=peers, placement=placement, train={"epochs": epochs})
        said = run_ranks(world, train_elastic, config)[0]
    assert (
        "4 ranks at the start before, 3 now: peers live as balanced: peer 0 on 2 ranks, peer 1 on 1 rank, 3 in all"
        in said
    )
    assert read_metrics(tmp_path)[-1]["step"] == 10

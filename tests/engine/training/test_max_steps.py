"""Runs that are so many updates long, and evaluations every so many of them."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest

from engine.config import ConfigError
from engine.preflight import check_run
from engine.ranks.collectives import Launch
from engine.reporting.tracking import read_metrics
from tests.runs import assert_same_weights, small_run, train_here, weights
from tests.worlds import run_ranks


def _run(tiny: Path, folder: Path, steps: int, **sections: Any) -> Any:
    """5 updates an epoch; the epochs of the config do not count."""
    sections = {"train": {"max_steps": steps}, "log": {"every_steps": 1}, **sections}
    return small_run(tiny, folder, evaluation={"every_epochs": None, "every_steps": 4}, **sections)


def test_a_run_that_ends_within_an_epoch_goes_on_to_a_later_end(tiny: Path, tmp_path: Path) -> None:
    constant = {"schedule": {"name": "constant"}}
    for steps in (7, 12):
        run_ranks(2, train_here, _run(tiny, tmp_path / "cut", steps, **constant))
    run_ranks(2, train_here, _run(tiny, tmp_path / "whole", 12, **constant))
    assert_same_weights(weights(tmp_path / "cut", 12), weights(tmp_path / "whole", 12), 0)
    scored = [line["step"] for line in read_metrics(tmp_path / "cut") if "val/disagreement" in line]
    assert scored == [4, 7, 8, 12]


def test_the_schedule_is_as_long_as_the_run(tiny: Path, tmp_path: Path) -> None:
    run_ranks(1, train_here, _run(tiny, tmp_path, 6))
    found = [line["lr"] for line in read_metrics(tmp_path) if "lr" in line]
    assert found == pytest.approx([0.025 * (1 + math.cos(math.pi * t / 6)) for t in range(6)])


def test_a_warm_up_beyond_the_end_is_refused(tiny: Path, tmp_path: Path) -> None:
    config = _run(tiny, tmp_path, 6, schedule={"warmup_epochs": 1.5})
    with pytest.raises(ConfigError, match=r"warmup_epochs = 1.5: expected at most train.max_steps = 6, 1.20 epochs"):
        check_run(config, Launch(0, 0, 1))


def test_a_run_without_an_end_is_refused(tiny: Path, tmp_path: Path) -> None:
    with pytest.raises(
        ConfigError, match=r"train.epochs: missing; expected a number of epochs, or of updates as max_st"
    ):
        small_run(tiny, tmp_path, train={"epochs": None})

"""What may be different when a run goes on: what never matters, what must be meant, and what is another run."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from engine.config import ConfigError, RunConfig
from engine.config.loading import validate
from engine.preflight import check_run
from engine.ranks.collectives import Launch
from tests.runs import small_run, train_here
from tests.worlds import run_ranks

ALONE = Launch(0, 0, 1)

FREE = [
    ("train.epochs", 5),
    ("train.max_steps", 12),
    ("train.max_skipped", 3),
    ("train.timeout", 100.0),
    ("evaluation.every_epochs", 2),
    ("evaluation.every_steps", 2),
    ("evaluation.batch", 7),
    ("checkpoint.keep", 5),
    ("checkpoint.every_steps", 3),
    ("log.every_steps", 1),
    ("log.wandb_project", "other"),
    ("health.spike_factor", 9.0),
    ("report.deployed", "best"),
    ("precision.channels_last", "off"),
    ("placement.kind", "colocated"),
    ("name", "other"),
]
MEANT = [
    ("optimizer.lr", 0.01),
    ("schedule.name", "constant"),
    ("schedule.warmup_epochs", 1.0),
    ("schedule.min_lr", 0.001),
    ("train.clip_norm", 1.0),
    ("train.ema_decay", 0.9),
    ("train.ema_warmup", False),
]
ANOTHER_RUN = [
    ("seed", 1),
    ("method.weight", 2.0),
    ("optimizer.weight_decay", 0.1),
    ("optimizer.momentum", 0.8),
    ("data.global_batch", 12),
    ("data.augmentation.padding", 2),
    ("train.accumulation", 2),
    ("train.ema_decay", None),
    ("precision.amp", "bf16"),
]


@pytest.fixture(scope="module")
def run(tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> RunConfig:
    config = small_run(tiny, tmp_path_factory.mktemp("run"), train={"epochs": 2, "ema_decay": 0.5})
    run_ranks(1, train_here, config)
    return config


def changed(run: RunConfig, key: str, value: Any, **checkpoint: Any) -> RunConfig:
    raw = run.model_dump(mode="json")
    here: Any = raw
    *path, last = key.split(".")
    for part in path:
        here = here[part]
    here[last] = value
    raw["checkpoint"] |= checkpoint
    return validate(raw)


@pytest.mark.parametrize(("key", "value"), FREE)
def test_what_numbers_do_not_depend_on_may_change(run: RunConfig, key: str, value: Any) -> None:
    check_run(changed(run, key, value), ALONE)


@pytest.mark.parametrize(("key", "value"), MEANT)
def test_a_recipe_changes_only_where_that_is_meant(run: RunConfig, key: str, value: Any) -> None:
    with pytest.raises(ConfigError, match=rf"^{key} = {value!r}: .* was started with .*recipe_may_change=true goes on"):
        check_run(changed(run, key, value), ALONE)
    check_run(changed(run, key, value, recipe_may_change=True), ALONE)


@pytest.mark.parametrize(("key", "value"), ANOTHER_RUN)
def test_all_else_is_another_run(run: RunConfig, key: str, value: Any) -> None:
    for meant in (False, True):
        with pytest.raises(ConfigError, match=rf"^{key} = {value!r}: the run in .* was started with ") as error:
            check_run(changed(run, key, value, recipe_may_change=meant), ALONE)
        assert "recipe_may_change" not in str(error.value)


def test_what_has_changed_is_said_and_takes_effect(
    tiny: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    config = small_run(tiny, tmp_path, train={"epochs": 1}, schedule={"name": "constant"})
    train_here(config)
    assert "other than at the start before" not in capfd.readouterr().err
    longer = changed(changed(config, "train.epochs", 2), "optimizer.lr", 0.01, recipe_may_change=True)
    train_here(longer)
    said = next(line for line in capfd.readouterr().err.splitlines() if line.startswith("other than at the start"))
    assert "train.epochs: 1 -> 2" in said
    assert "optimizer.lr: 0.05 -> 0.01" in said
    lines = (tmp_path / "metrics.jsonl").read_text()
    assert '"lr": 0.05' in lines
    assert '"lr": 0.01' in lines

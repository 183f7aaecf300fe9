"""Which network stands for a run in the final table."""

from __future__ import annotations

from typing import Any

import pytest

from engine.config import ConfigError, RunConfig
from engine.reporting.report.table import deployed
from losses import METHODS
from tests.engine.stepping import config_of

SCORES = {
    "val/cifar_resnet8_b-0/top1": 40.0,
    "val/cifar_resnet8_b-1/top1": 46.0,
    "val/cifar_resnet8_b-2/top1": 43.0,
    "val/ensemble/top1": 50.0,
    "ema/cifar_resnet8_b-0/top1": 48.0,
    "ema/ensemble/top1": 51.0,
}


def of(choice: str | None, method: str = "okddip") -> RunConfig:
    train: dict[str, Any] = {"epochs": 1} | ({"ema_decay": 0.9} if choice == "ema" and method != "pcl" else {})
    return config_of({"name": method}, 3, report={"deployed": choice}, train=train)


@pytest.mark.parametrize(
    ("choice", "line"),
    [
        ("first", "cifar_resnet8_b-0 (first), top-1 40.00 %"),
        ("best", "cifar_resnet8_b-1 (best), top-1 46.00 %"),
        ("leader", "cifar_resnet8_b-2 (leader), top-1 43.00 %"),
        ("mean", "the mean of the peers, top-1 43.00 %"),
        ("ema", "the moving average of cifar_resnet8_b-0, top-1 48.00 %"),
        ("ensemble", "the ensemble, top-1 50.00 %"),
    ],
)
def test_every_choice(choice: str, line: str) -> None:
    assert deployed(of(choice), SCORES) == line


def test_each_method_has_its_papers_choice() -> None:
    chosen = {name: of(None, name).deployed for name in METHODS if name != "ffl"}
    assert (chosen["okddip"], chosen["pcl"], chosen["one"]) == ("leader", "ema", "first")
    assert {chosen[name] for name in ("independent", "dml", "kdcl")} == {"mean"}
    assert all(deployed(of(None, name), SCORES) for name in chosen)


def test_what_is_not_there_is_refused() -> None:
    with pytest.raises(
        ConfigError, match=r"^report.deployed = 'ema': there are no moving averages; expected train.ema"
    ):
        config_of({"name": "dml"}, report={"deployed": "ema"})
    with pytest.raises(ConfigError, match=r"^report.deployed = 'leader': dml has none; expected first, best or mean$"):
        config_of({"name": "dml"}, report={"deployed": "leader"})
    with pytest.raises(
        ConfigError, match=r"report.deployed = 'worst': expected one of first, best, mean, leader, ema, ens"
    ):
        config_of({"name": "dml"}, report={"deployed": "worst"})

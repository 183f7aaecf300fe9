"""What is said of a run before it has cost anything."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

import models
from engine.config import RunConfig
from engine.training.remarks import remarks, twins
from tests.engine.stepping import cohort_of, config_of
from tests.runs import small_run, train_here
from tests.worlds import run_world


@pytest.mark.parametrize(
    ("train", "steps", "said"),
    [
        ({"ema_decay": 0.99}, 101, None),
        (
            {"ema_decay": 0.99},
            99,
            "one over 100 updates and the run has 99; its warm-up makes it one over the last 22 ",
        ),
        ({"ema_decay": 0.99, "ema_warmup": False}, 459, None),  # 0.99^459 = 0.0099
        ({"ema_decay": 0.99, "ema_warmup": False}, 69, "it is still the initial weights by 50 %"),  # 0.99^69 = 0.4998
        ({}, 1, None),
    ],
)
def test_an_average_that_outlasts_the_run_is_said(train: dict[str, Any], steps: int, said: str | None) -> None:
    config = config_of(train={"epochs": 1, **train})
    found = list(remarks(config, steps, steps * config.data.global_batch)) if steps > 1 else []
    assert len(found) == (said is not None)
    assert all(str(said) in note for note in found)


@pytest.mark.parametrize(
    ("steps", "left", "said"),
    [(1, 0, "one step an epoch"), (1, 7, "7 of 31 images"), (5, 20, "20 of 140"), (5, 13, None), (10, 23, None)],
)
def test_few_steps_and_images_that_are_not_shown_are_said(steps: int, left: int, said: str | None) -> None:
    config = config_of(data={"dataset": "fashion_mnist_subset", "global_batch": 24})
    found = list(remarks(config, steps, steps * 24 + left))
    assert len(found) == (said is not None)
    assert all(str(said) in note for note in found)


def found_twins(config: RunConfig) -> list[str]:
    return list(twins(cohort_of(config)))


@pytest.mark.parametrize("ranks", [1, 2])
def test_peers_that_start_alike_are_found_wherever_they_live(tmp_path: Path, ranks: int) -> None:
    torch.save(models.create("cifar_resnet8_b", 10, 1, width=4).state_dict(), tmp_path / "own.pt")
    torch.save(models.create("cifar_resnet8_b", 7, 1, width=4).state_dict(), tmp_path / "other.pt")
    same: dict[str, Any] = {"network": "cifar_resnet8_b", "copies": 2, "options": {"width": 4}}
    for file, views, twin in (("own.pt", "shared", True), ("other.pt", "shared", False), ("own.pt", "per_peer", False)):
        config = config_of(peers=[{**same, "pretrained": str(tmp_path / file)}], data={"views": views})
        for found in run_world(ranks, found_twins, config):
            assert len(found) == twin
            assert all("peers cifar_resnet8_b-0, cifar_resnet8_b-1 start from the same weights" in x for x in found)


def test_twins_and_short_averages_are_said_when_a_run_starts(
    tiny: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    torch.save(models.create("cifar_resnet8_b", 10, 1, width=4).state_dict(), tmp_path / "own.pt")
    same = {"network": "cifar_resnet8_b", "copies": 2, "options": {"width": 4}, "pretrained": str(tmp_path / "own.pt")}
    train = {"epochs": 1, "ema_decay": 0.9}
    train_here(small_run(tiny, tmp_path / "run", {"name": "dml"}, [same], train=train))
    said = capfd.readouterr().err
    assert said.count("note: ") == 2
    assert "start from the same weights" in said
    assert "one over 10 updates and the run has 5" in said

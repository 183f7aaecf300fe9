"""Losses that jump, and peers that no longer learn, found in real runs; and none found where nothing is wrong."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

import models
from engine.config import HealthConfig, RunConfig
from engine.reporting.tracking import read_metrics
from engine.safety.health import CODES, collapsed
from engine.safety.spikes import LossWatch, Spike
from tests.marks import slow
from tests.runs import small_run, train_here
from tests.worlds import run_ranks

# -- spikes -----------------------------------------------------------------------------------------------------------

WATCHED = HealthConfig(spike_factor=4.0, spike_deviations=0.0, spike_floor=0.5, spike_window=4)


def test_a_spike_is_measured_against_the_median_of_the_steps_before() -> None:
    watch = LossWatch(WATCHED, {})
    # Judged from the third on, against 1.5, 1, 1.5, ...
    assert watch.spikes({"a": [2.0, 1.0, 5.9, 1.0], "b": [1.0, 1.0, 4.0, 4.1]}) == [Spike("b", 3, 4.1, 1.0, 1)]
    assert watch.recent == {"a": [2.0, 1.0, 5.9, 1.0], "b": [1.0, 1.0, 4.0, 4.1]}
    # The median of a's last four is 1.5.
    assert watch.spikes({"a": [6.0]}) == []


def test_where_losses_scatter_a_spike_has_to_stand_out() -> None:
    """Around the median of 3 the deviations are 2, 2, 0, 0, 1, 1, their median is 1: a spike is above 3 + 10."""
    scattered = {"a": [1.0, 5.0, 3.0, 3.0, 2.0, 4.0]}
    config = HealthConfig(spike_factor=2.0, spike_deviations=10.0, spike_window=6)
    assert LossWatch(config, scattered).spikes({"a": [12.9]}) == []
    assert LossWatch(config, scattered).spikes({"a": [13.1]}) == [Spike("a", 0, 13.1, 3.0, 1)]
    assert LossWatch(config, {"a": [3.0] * 6}).spikes({"a": [6.1]}) == [Spike("a", 0, 6.1, 3.0, 1)]


def test_a_loss_that_stays_high_becomes_the_usual() -> None:
    watch = LossWatch(WATCHED, {"a": [1.0] * 4})
    assert watch.spikes({"a": [9.0] * 6}) == [Spike("a", 0, 9.0, 1.0, 2)]  # then 1, 1, 9, 9 have the median 5


def test_small_losses_differ_by_many_times_without_being_a_spike() -> None:
    watch = LossWatch(WATCHED, {"a": [0.001] * 4})
    assert watch.spikes({"a": [1.9]}) == []
    assert watch.spikes({"a": [2.1]}) == [Spike("a", 0, 2.1, 0.001, 1)]


def test_skipped_steps_are_neither_judged_nor_remembered() -> None:
    watch = LossWatch(WATCHED, {"a": [1.0] * 4})
    assert watch.spikes({"a": [math.nan, 5.0, math.nan]}) == [Spike("a", 1, 5.0, 1.0, 1)]
    assert watch.recent == {"a": [1.0, 1.0, 1.0, 5.0]}


def test_null_looks_for_none() -> None:
    assert LossWatch(HealthConfig(spike_factor=None, spike_window=2), {"a": [1.0, 1.0]}).spikes({"a": [1e9]}) == []


# -- collapsed peers --------------------------------------------------------------------------------------------------

SMALL: dict[str, Any] = {"network": "cifar_resnet8_b", "options": {"width": 4}}


@pytest.fixture
def dead(tmp_path: Path) -> Path:
    """SqueezeNet ends with a ReLU. Where the classifier before it gives only negative numbers, logits stay 0."""
    state = models.create("torchvision/squeezenet1_1", 10, 1).state_dict()
    state["classifier.1.bias"].fill_(-1e4)
    save_file(state, tmp_path / "dead.safetensors")
    return tmp_path / "dead.safetensors"


def with_a_dead_peer(tiny: Path, folder: Path, dead: Path) -> RunConfig:
    peers = [
        {"network": "torchvision/squeezenet1_1", "name": "dead", "pretrained": str(dead)},
        {**SMALL, "name": "well"},
    ]
    return small_run(tiny, folder, {"name": "dml"}, peers, train={"epochs": 2})


def assert_one_is_dead_and_one_is_well(folder: Path) -> None:
    lines = read_metrics(folder)
    trained = [line for line in lines if "lr" in line]
    assert (len(trained), len(lines)) == (6, 8)
    for line in lines:
        # At an evaluation it takes two looks.
        first_look = line not in trained and line is not lines[-1]
        expected = CODES["no gradient"] if line in trained else None if first_look else CODES["all images alike"]
        assert line.get("health/dead/collapsed") == expected
        assert "health/well/collapsed" not in line
    assert lines[-1]["val/dead/spread"] == pytest.approx(0, abs=1e-12)
    assert trained[-1]["train/dead/grad_norm"] == 0
    assert trained[-1]["train/dead/ce"] == pytest.approx(math.log(10), rel=1e-4)


def test_a_peer_of_dead_relus_has_collapsed_which_is_said_once(
    tiny: Path, tmp_path: Path, dead: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    train_here(with_a_dead_peer(tiny, tmp_path / "run", dead))
    assert_one_is_dead_and_one_is_well(tmp_path / "run")
    said = [line for line in capfd.readouterr().err.splitlines() if "has collapsed" in line]
    assert [line.split(":")[1] for line in said] == [
        " dead has collapsed, no gradient",
        " dead has collapsed, all images alike",
    ]
    assert "other initial weights" in said[0]


def test_a_peer_that_collapses_on_another_rank_is_found(tiny: Path, tmp_path: Path, dead: Path) -> None:
    run_ranks(2, train_here, with_a_dead_peer(tiny, tmp_path / "run", dead))
    assert_one_is_dead_and_one_is_well(tmp_path / "run")


def test_a_peer_that_names_one_class_for_all_has_collapsed(tiny: Path, tmp_path: Path) -> None:
    """Found by its probabilities: its gradient is not 0, and its logits differ a little."""
    state = models.create("cifar_resnet8_b", 10, 1, width=4).state_dict()
    state["fc.bias"][3] = 1e3
    save_file(state, tmp_path / "biased.safetensors")
    peers = [{**SMALL, "name": "biased", "pretrained": str(tmp_path / "biased.safetensors")}, {**SMALL, "name": "well"}]
    config = small_run(tiny, tmp_path / "run", {"name": "independent"}, peers)
    run_ranks(1, train_here, config)
    last = read_metrics(tmp_path / "run")[-1]
    assert last["health/biased/collapsed"] == CODES["all images alike"]
    assert "health/well/collapsed" not in last


def test_running_statistics_that_are_not_there_yet_are_no_collapse() -> None:
    """After a few steps BatchNorm's running statistics are still those of the start, and every image of a deep network
    gets the same; an evaluation later they are there."""
    values = {"val/a/spread": 1e-9, "val/a/apart": 1.0}
    assert collapsed(values, None, ["a"]) == {}
    assert collapsed(values, {"val/a/spread": 0.3, "val/a/apart": 1.0}, ["a"]) == {}
    assert collapsed(values, values, ["a"]) == {"a": "all images alike"}
    assert collapsed({"val/a/spread": 0.2, "val/a/apart": 1.0}, values, ["a"]) == {}


def test_a_run_that_goes_on_remembers_its_last_look(tiny: Path, tmp_path: Path, dead: Path) -> None:
    config = with_a_dead_peer(tiny, tmp_path / "run", dead)
    stopped = config.model_copy(update={"train": config.train.model_copy(update={"epochs": 1})})
    run_ranks(1, train_here, stopped)
    run_ranks(1, train_here, config)
    assert_one_is_dead_and_one_is_well(tmp_path / "run")


@pytest.mark.parametrize("ranks", [1, 2])
def test_two_peers_from_one_file_of_weights_are_twins(tiny: Path, tmp_path: Path, ranks: int) -> None:
    torch.manual_seed(0)
    save_file(models.create("cifar_resnet8_b", 10, 1, width=4).state_dict(), tmp_path / "one.safetensors")
    same = {**SMALL, "pretrained": str(tmp_path / "one.safetensors")}
    peers = [{**same, "name": "a"}, {**same, "name": "b"}, {**SMALL, "name": "c"}]
    run_ranks(ranks * 3 if ranks > 1 else 1, train_here, small_run(tiny, tmp_path / "run", {"name": "dml"}, peers))
    for line in read_metrics(tmp_path / "run"):
        found = {key: value for key, value in line.items() if key.startswith("health/")}
        twins = {f"health/{name}/collapsed": CODES["another's twin"] for name in "ab"}
        assert found == (twins if "val/disagreement" in line else {})


@pytest.mark.parametrize(
    "method",
    [
        *("dml", "one", "dcm", "dcl"),
        *(slow(name) for name in ("independent", "kdcl", "cl_ilr", "okddip", "ffl", "codistillation")),
    ],
)
def test_nothing_is_found_where_nothing_is_wrong(tiny: Path, tmp_path: Path, method: str) -> None:
    """From scratch at a rate of 0.1; every step of 10 on few images, whose losses scatter."""
    config = small_run(
        tiny,
        tmp_path,
        {"name": method},
        3 if method == "okddip" else 2,
        optimizer={"lr": 0.1},
        health={"spike_window": 4},
        data={"views": "per_peer"} if method == "kdcl" else {},
    )
    run_ranks(1, train_here, config)
    assert [key for line in read_metrics(tmp_path) for key in line if key.startswith("health/")] == []

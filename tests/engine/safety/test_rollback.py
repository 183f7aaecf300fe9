"""A run that goes back when numbers go wrong, and is killed while it does. Real mislabelled images, ranks and kills."""

from __future__ import annotations

import json
import math
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from data_pipelines.config import DataConfig
from data_pipelines.order import epoch_order
from data_pipelines.sources.standard_sets import STANDARD
from engine.config import ConfigError, RunConfig
from engine.ranks.collectives import Launch
from engine.reporting.tracking import read_metrics
from engine.safety import checkpoint, loading, rollback
from engine.safety.answers import TrainingDivergedError
from engine.safety.checkpoint import CheckpointError
from engine.safety.rollback import Rollback
from engine.trainer import train
from tests.data_pipelines.files import write_idx
from tests.kills import assert_same_state, chance, final_state, kill_run, last_step, numbers
from tests.marks import slow
from tests.runs import small_run, train_here, weights
from tests.worlds import run_ranks

BATCH, STEPS = 24, 30
BAD = 20  # The update, counted from 0, whose batch is mislabelled.


@pytest.fixture(scope="module")
def mislabelled(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Trousers and boots of Fashion-MNIST, soon told apart; one batch of the first epoch has each called the other."""
    root = tmp_path_factory.mktemp("mislabelled")
    source = DataConfig(dataset="fashion_mnist_subset", global_batch=1).folder
    for stem, split, size in zip(
        ("train", "t10k"), STANDARD["fashion_mnist"].read(source), (BATCH * STEPS, 40), strict=True
    ):
        chosen = np.flatnonzero(np.isin(split.labels, (1, 9)))[:size]
        images, labels = split.images[chosen], split.labels[chosen].astype(np.uint8)
        if stem == "train":
            bad = epoch_order(0, 0, size)[BAD * BATCH : (BAD + 1) * BATCH]
            labels[bad] = 10 - labels[bad]
        write_idx(root / f"{stem}-images-idx3-ubyte.gz", images.reshape(-1, 28, 28))
        write_idx(root / f"{stem}-labels-idx1-ubyte.gz", labels)
    return root


def a_run(mislabelled: Path, folder: Path, **sections: Any) -> RunConfig:
    """One epoch of 30 steps; a line of metrics every 3 steps, a checkpoint every 4."""
    sections = {
        "train": {"epochs": 1},
        "schedule": {"name": "constant"},
        "checkpoint": {"every_steps": 4},
        "log": {"every_steps": 3},
        **sections,
        "health": {"spike_window": 10, "rollback": True, **sections.get("health", {})},
    }
    return small_run(mislabelled, folder, {"name": "dml"}, **sections)


@pytest.fixture(scope="module")
def undisturbed(mislabelled: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run on two ranks that goes back and that nobody kills."""
    folder = tmp_path_factory.mktemp("undisturbed")
    run_ranks(2, train_here, a_run(mislabelled, folder))
    return folder


def assert_ends_as(folder: Path, undisturbed: Path) -> None:
    assert_same_state(final_state(folder), final_state(undisturbed))
    assert numbers(folder) == numbers(undisturbed)
    assert rollback.read(folder) == rollback.read(undisturbed)


# -- without a rollback -----------------------------------------------------------------------------------------------


def test_a_mislabelled_batch_is_a_spike_at_its_step_and_said(
    mislabelled: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    train_here(a_run(mislabelled, tmp_path, health={"rollback": False}))
    said = [line for line in capfd.readouterr().err.splitlines() if "median of the steps before" in line]
    assert said[0].startswith(f"step {BAD + 1}: the loss of cifar_resnet8_b-")
    assert "optimizer.lr" in said[0]
    assert not (tmp_path / "rollbacks.json").exists()
    assert last_step(tmp_path) == STEPS


def test_ranks_find_the_same_spikes(mislabelled: Path, tmp_path: Path) -> None:
    found = []
    for ranks in (1, 2):
        folder = tmp_path / str(ranks)
        run_ranks(ranks, train_here, a_run(mislabelled, folder, health={"rollback": False}))
        spikes = {(line["step"], key) for line in read_metrics(folder) for key in line if key.endswith("/spikes")}
        assert min(spikes)[0] == BAD + 1  # the line of the steps up to 21
        found.append(spikes)
    assert found[0] == found[1]


# -- going back -------------------------------------------------------------------------------------------------------


def test_a_run_goes_back_and_leaves_out_the_steps_that_went_wrong(
    undisturbed: Path, mislabelled: Path, tmp_path: Path
) -> None:
    """The line of step 21 has the steps 21, so updates 19 (whose loss was taken before it did harm) and 20 go."""
    [back] = rollback.read(undisturbed)
    assert (back.begin, back.end) == (BAD - 1, BAD + 1)
    assert back.reason.startswith(f"step {BAD + 1}: the loss of ")

    lines = read_metrics(undisturbed)
    trained = [line for line in lines if "lr" in line]
    steps = [line["step"] for line in trained]
    assert steps == sorted({*range(3, STEPS + 1, 3), *range(4, STEPS + 1, 4)})
    assert {line["step"]: line["health/left_out"] for line in trained if "health/left_out" in line} == {20: 1, 21: 1}
    assert not [line for line in lines for key in line if key.endswith("/spikes")]
    assert trained[steps.index(21)]["train/cifar_resnet8_b-0/ce"] is None  # Nothing was trained on.
    assert all(math.isfinite(line["train/cifar_resnet8_b-0/ce"]) for line in trained if line["step"] != 21)
    assert loading.verify(checkpoint.folder_of(undisturbed, STEPS)).rollbacks == 1

    one = a_run(mislabelled, tmp_path)
    run_ranks(1, train_here, one)
    assert [(b.begin, b.end) for b in rollback.read(tmp_path)] == [(back.begin, back.end)]
    assert_same_state(final_state(tmp_path), final_state(undisturbed), relative=1e-4)


def test_the_data_of_the_steps_left_out_is_not_trained_on(mislabelled: Path, tmp_path: Path) -> None:
    """The weights are the same where the images and labels of those steps are something else. The run on that other
    data set is told which steps to leave out."""
    other = tmp_path / "other"
    shutil.copytree(mislabelled, other)
    split, _ = STANDARD["fashion_mnist"].read(mislabelled)
    images, labels = split.images.copy(), split.labels.astype(np.uint8)
    chosen = epoch_order(0, 0, BATCH * STEPS)[(BAD - 1) * BATCH : (BAD + 1) * BATCH]
    images[chosen] = 255 - images[chosen]
    labels[chosen] = 3
    write_idx(other / "train-images-idx3-ubyte.gz", images.reshape(-1, 28, 28))
    write_idx(other / "train-labels-idx1-ubyte.gz", labels)

    run_ranks(1, train_here, a_run(mislabelled, tmp_path / "one"))
    (tmp_path / "two").mkdir()
    rollback.write(tmp_path / "two", [Rollback(BAD - 1, BAD + 1, "by hand")])
    run_ranks(1, train_here, a_run(other, tmp_path / "two"))
    assert_same_state(final_state(tmp_path / "two"), final_state(tmp_path / "one"))


def test_wandb_goes_on_as_one_run_and_tells_of_it(mislabelled: Path, tmp_path: Path) -> None:
    run_ranks(1, train_here, a_run(mislabelled, tmp_path, log={"every_steps": 3, "wandb": "offline"}))
    name = (tmp_path / "wandb_id").read_text()
    files = sorted((tmp_path / "wandb").glob(f"offline-run-*-{name}/*.wandb"))
    assert b"going back" in b"".join(file.read_bytes() for file in files)
    lines = read_metrics(tmp_path)
    assert lines == sorted(lines, key=lambda line: line["step"])
    assert lines[-1]["step"] == STEPS
    assert len(rollback.read(tmp_path)) == 1


# -- killed while it goes back ----------------------------------------------------------------------------------------


def starts(folder: Path) -> int:
    """How often the run has been built up, rollbacks among them."""
    path = folder / "starts.json"
    return len(json.loads(path.read_text())) if path.exists() else 0


@pytest.mark.parametrize(
    "moment",
    ["as it is written down", slow("in between"), "built anew", slow("while steps are left out"), slow("later")],
)
def test_a_run_killed_around_a_rollback_ends_as_the_undisturbed_one(
    mislabelled: Path, tmp_path: Path, undisturbed: Path, moment: str
) -> None:
    config, written = a_run(mislabelled, tmp_path), tmp_path / "rollbacks.json"
    mercy = 0.0
    if moment == "in between":
        mercy = chance.uniform(0.0, 0.15)
    due = {
        "as it is written down": lambda: last_step(tmp_path) >= BAD + 1 or written.exists(),
        "in between": lambda: written.exists(),
        "built anew": lambda: starts(tmp_path) == 2,
        "while steps are left out": lambda: starts(tmp_path) == 2 and last_step(tmp_path) in (18, 20),
        "later": lambda: starts(tmp_path) == 2 and last_step(tmp_path) in range(21, 28),
    }[moment]
    kill_run(2, config, due, victim=chance.randrange(2), mercy=mercy)
    print(f"rollbacks: {rollback.read(tmp_path)}")
    run_ranks(2, train_here, config)
    assert_ends_as(tmp_path, undisturbed)


def test_checkpoints_from_after_the_bad_steps_do_not_count_once_a_rollback_is_written_down(
    mislabelled: Path, tmp_path: Path, undisturbed: Path
) -> None:
    """As a kill would leave it between the two: here with all checkpoints of a run that went on regardless."""
    run_ranks(
        2,
        train_here,
        a_run(mislabelled, tmp_path, checkpoint={"every_steps": 4, "keep": 9}, health={"rollback": False}),
    )
    assert {20, 24, 28, 30} < set(checkpoint.steps_on_disk(tmp_path))
    rollback.write(tmp_path, rollback.read(undisturbed))
    run_ranks(2, train_here, a_run(mislabelled, tmp_path))
    assert_ends_as(tmp_path, undisturbed)


def test_a_run_without_a_checkpoint_from_before_begins_again(mislabelled: Path, tmp_path: Path) -> None:
    config = a_run(mislabelled, tmp_path, checkpoint={"every_steps": None})
    run_ranks(1, train_here, config)
    assert len(rollback.read(tmp_path)) == 1
    assert [line["step"] for line in read_metrics(tmp_path) if "lr" in line] == list(range(3, STEPS + 1, 3))


# -- non-finite numbers, and the limit --------------------------------------------------------------------------------


def outcome(config: RunConfig) -> str:
    try:
        train(config, Launch.from_environment())
    except TrainingDivergedError as error:
        return str(error)
    return "ended"


def test_a_row_of_skipped_updates_is_gone_back_from(tiny: Path, tmp_path: Path) -> None:
    """The first 4 updates, at an absurd rate, make the weights infinite. Left out, the rest trains."""
    config = small_run(
        tiny,
        tmp_path,
        optimizer={"lr": 1e38},
        schedule={"name": "step", "milestones": [0.8], "gamma": 5e-40},
        train={"max_skipped": 3},
        health={"rollback": True},
    )
    assert run_ranks(2, outcome, config) == ["ended", "ended"]
    [back] = rollback.read(tmp_path)
    assert (back.begin, back.end) == (0, 4)
    assert back.reason == (
        "3 updates in a row met a non-finite loss or gradient, up to step 4; the limit is train.max_skipped = 3"
    )
    assert all(tensor.isfinite().all() for tensor in weights(tmp_path).values())
    assert math.isfinite(read_metrics(tmp_path)[-2]["train/cifar_resnet8_b-0/ce"])


def test_after_the_last_rollback_a_run_ends_on_all_ranks(tiny: Path, tmp_path: Path) -> None:
    config = small_run(
        tiny,
        tmp_path,
        optimizer={"lr": 1e38},
        schedule={"name": "constant"},
        train={"max_skipped": 3, "epochs": 4},
        health={"rollback": True, "max_rollbacks": 1},
    )
    expected = (
        "step 5: the evaluation gave val/cifar_resnet8_b-0/loss = nan: the weights have diverged. The "
        "run has gone back 1 times; the limit is health.max_rollbacks = 1. Try a smaller optimizer.lr, "
        "train.clip_norm, schedule.warmup_epochs or precision.amp = bf16"
    )
    assert run_ranks(2, outcome, config) == [expected, expected]
    assert len(rollback.read(tmp_path)) == 1
    # A start of the run in this state comes to the same end.
    assert run_ranks(1, outcome, config) == [expected]


# -- files and configs ------------------------------------------------------------------------------------------------


def test_one_checkpoint_is_too_few(tiny: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError) as error:
        small_run(tiny, tmp_path, health={"rollback": True}, checkpoint={"keep": 1})
    assert str(error.value) == (
        "checkpoint.keep = 1: the only checkpoint may be from after a step that went wrong; with health.rollback = "
        "true expected at least 2"
    )


@pytest.mark.parametrize("content", ["", "{}", "[3]", '[{"begin": 1}]', "\udcff"])
def test_a_damaged_list_of_rollbacks_is_refused_by_name(tiny: Path, tmp_path: Path, content: str) -> None:
    (tmp_path / "rollbacks.json").write_text(content, errors="surrogateescape")
    with pytest.raises(CheckpointError) as error:
        train_here(small_run(tiny, tmp_path))
    assert str(error.value).startswith(f"{tmp_path / 'rollbacks.json'}: not a list of rollbacks: ")

"""What a run must find as it left it, to go on; and that all ranks read the same checkpoint, byte by byte."""

from __future__ import annotations

import json
import re
import shutil
import socket
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from data_pipelines.sources.opening import open_photos
from engine.config import ConfigError, RunConfig
from engine.config.loading import validate
from engine.preflight import check_run
from engine.ranks.collectives import Launch
from engine.reporting.tracking import read_metrics
from engine.safety import checkpoint, loading
from engine.safety.checkpoint import CheckpointError
from launch import run_folder
from tests.checkpoints import PEER, a_run, forge
from tests.data_pipelines.files import write_photos
from tests.launch.command import run_command
from tests.runs import small_run, train_here
from tests.worlds import run_ranks

# -- data -------------------------------------------------------------------------------------------------------------


def of_photos(at: Path, epochs: int, method: dict[str, Any] | None = None, **checkpoints: Any) -> RunConfig:
    """27 photos of 3 classes in batches of 4: 6 steps an epoch. They are listed anew, as by a process of its own."""
    open_photos.cache_clear()
    raw = small_run(at, at / "run", method, schedule={"name": "constant"}).model_dump(mode="json")
    data = {"dataset": "image_folder", "root": str(at / "data"), "global_batch": 4, "image": {"size": 32, "resize": 36}}
    return validate(raw | {"data": data, "train": {"epochs": epochs}, "checkpoint": checkpoints})


def lose(data: Path, count: int) -> None:
    for index in range(count):
        next((data / f"train/n00{index % 3}").glob("0[5-9].*")).unlink()


def test_a_photo_that_was_lost_is_named_and_goes_on_only_where_it_is_meant(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_photos(tmp_path / "data")
    train_here(of_photos(tmp_path, 1))
    lose(tmp_path / "data", 1)
    before = (tmp_path / "run/metrics.jsonl").read_bytes()
    with pytest.raises(ConfigError) as error:
        train_here(of_photos(tmp_path, 2))
    pattern = (
        rf"data: train samples: 26 samples \(\w+\); the run in {tmp_path}/run was started with 27 samples \(\w+\): "
    )
    assert re.match(pattern, str(error.value)), error.value
    assert "checkpoint.data_may_change=true goes on: an epoch keeps its 6 steps" in str(error.value)
    assert (tmp_path / "run/metrics.jsonl").read_bytes() == before
    capsys.readouterr()
    train_here(of_photos(tmp_path, 2, data_may_change=True))
    said = capsys.readouterr().err
    assert re.search(r"going on with other data: train samples: 27 samples \(\w+\) -> 26 samples", said), said
    assert [line["step"] for line in read_metrics(tmp_path / "run") if "lr" in line] == [2, 4, 6, 8, 10, 12]
    # And from then on these are its data.
    train_here(of_photos(tmp_path, 3))


def test_photos_that_were_added_leave_an_epoch_its_steps(tmp_path: Path) -> None:
    write_photos(tmp_path / "data")
    train_here(of_photos(tmp_path, 1))
    for index in range(8):  # 35 photos would make 8 steps.
        shutil.copy(tmp_path / "data/train/n000/00.JPEG", tmp_path / f"data/train/n000/9{index}.JPEG")
    train_here(of_photos(tmp_path, 2, data_may_change=True))
    lines = [(line["step"], line["epoch"]) for line in read_metrics(tmp_path / "run") if "val/disagreement" in line]
    assert lines == [(6, 1.0), (12, 2.0)]
    train_here(of_photos(tmp_path, 3))
    assert checkpoint.steps_on_disk(tmp_path / "run")[-1] == 18


def test_an_epoch_for_which_too_few_photos_are_left_keeps_its_steps(tmp_path: Path) -> None:
    write_photos(tmp_path / "data")
    train_here(of_photos(tmp_path, 1))
    lose(tmp_path / "data", 8)  # 19 photos fill 4 steps.
    train_here(of_photos(tmp_path, 2, data_may_change=True))
    assert [line["step"] for line in read_metrics(tmp_path / "run") if "val/disagreement" in line] == [6, 12]


def rename(data: Path) -> None:
    for split in ("train", "val"):
        (data / split / "n000").rename(data / split / "n005")


@pytest.mark.parametrize(
    ("method", "change", "why"),
    [
        (None, rename, "labels mean other classes now, so it cannot go on"),
        (
            {"name": "mcl", "negatives": "memory", "num_negatives": 4, "width": 8},
            lambda data: lose(data, 1),
            "mcl remembers each training image by its number, so it cannot go on",
        ),
    ],
    ids=["renamed", "banks"],
)
def test_other_data_that_no_key_makes_good(
    tmp_path: Path, method: dict[str, Any] | None, change: Callable[[Path], None], why: str
) -> None:
    write_photos(tmp_path / "data")
    train_here(of_photos(tmp_path, 1, method))
    classes = (tmp_path / "run/classes.json").read_bytes()
    change(tmp_path / "data")
    with pytest.raises(ConfigError, match=rf"^data: .*: the run in|^data: .*; the run in .*{why}"):
        train_here(of_photos(tmp_path, 2, method, data_may_change=True))
    assert (tmp_path / "run/classes.json").read_bytes() == classes


# -- the config -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("key", ["optimizer", "data"])
def test_the_checkpoint_knows_its_config_where_the_file_is_gone(tiny: Path, run: Path, key: str) -> None:
    (run / "config.yaml").unlink()
    other = {"optimizer": {"lr": 0.2}, "data": {"global_batch": 12}}
    name = {"optimizer": "optimizer.lr = 0.2", "data": "data.global_batch = 12"}[key]
    with pytest.raises(ConfigError, match=f"^{name}: the run in .* was started with "):
        check_run(a_run(tiny, run, **{key: other[key]}), Launch(0, 0, 1))
    check_run(a_run(tiny, run), Launch(0, 0, 1))


def test_a_key_that_was_not_there_yet_had_its_default(tiny: Path, run: Path) -> None:
    for step in checkpoint.steps_on_disk(run):
        forge(checkpoint.folder_of(run, step), lambda raw: raw["config"]["train"].pop("clip_norm") and None)
    check_run(a_run(tiny, run), Launch(0, 0, 1))
    with pytest.raises(ConfigError, match=r"^train\.clip_norm = 1\.0: "):
        check_run(a_run(tiny, run, train={"clip_norm": 1.0, "epochs": 2}), Launch(0, 0, 1))


def test_a_checkpoint_of_the_version_before_goes_on(tiny: Path, run: Path) -> None:
    def age(raw: dict[str, Any]) -> dict[str, Any]:
        return {k: v for k, v in raw.items() if k not in ("config", "data", "steps_per_epoch")} | {"version": 2}

    for step in checkpoint.steps_on_disk(run):
        forge(checkpoint.folder_of(run, step), age)
    train_here(a_run(tiny, run, train={"epochs": 3}))
    manifest = loading.verify(checkpoint.folder_of(run, 15))
    assert manifest.steps_per_epoch == 5
    assert manifest.data["train samples"].startswith("120 samples (")


# -- metrics ----------------------------------------------------------------------------------------------------------


def test_a_bit_that_turned_in_the_metrics_takes_its_own_line_alone(tiny: Path, run: Path) -> None:
    lines = (run / "metrics.jsonl").read_bytes().splitlines()
    damaged = bytearray(lines[2])
    damaged[0] ^= 1
    (run / "metrics.jsonl").write_bytes(b"\n".join([*lines[:2], damaged, *lines[3:], b'{"step": 99']))
    train_here(a_run(tiny, run))
    kept = [json.loads(line) for line in lines]
    assert read_metrics(run) == kept[:2] + kept[3:]
    assert (run / "metrics.cut.jsonl").read_bytes() == bytes(damaged) + b'\n{"step": 99\n'


# -- who reads what ---------------------------------------------------------------------------------------------------


def read_something_else(config: RunConfig) -> None:
    """On rank 1 a bit of what it reads is turned, as on its way from a file server."""
    read_bytes = loading.read_bytes

    def turned(path: Path) -> bytes:
        content = bytearray(read_bytes(path))
        content[len(content) // 2] ^= 1
        return bytes(content)

    if Launch.from_environment().rank == 1:
        loading.read_bytes = turned
    train_here(config)


def test_each_rank_checks_what_it_reads_itself(tiny: Path, run: Path) -> None:
    altered = f"{PEER}: altered: its SHA-256 is not the one in the manifest (rank 1 on {socket.gethostname()})"
    with pytest.raises(RuntimeError, match=re.escape(altered)):
        run_ranks(2, read_something_else, a_run(tiny, run, train={"epochs": 3}))


def evaluate_as(run: Path, out: Path) -> None:
    """Rank 1 would see a newer checkpoint than rank 0, if it looked."""

    def look(*_: Any) -> Any:
        raise AssertionError("rank 1 has chosen for itself")

    if Launch.from_environment().rank == 1:
        run_folder.choose = look
    run_command("evaluate", str(run), "--json", str(out))


def test_one_rank_chooses_the_checkpoint_for_all(run: Path, tmp_path: Path) -> None:
    run_ranks(2, evaluate_as, run, tmp_path / "scores.json")
    assert json.loads((tmp_path / "scores.json").read_text())["step"] == 10


def test_a_checkpoint_that_is_pruned_while_it_is_read_has_a_successor(run: Path) -> None:
    def action(manifest: checkpoint.Manifest) -> int:
        folder = checkpoint.folder_of(run, manifest.step)
        if manifest.step == 10:
            checkpoint.remove(folder)  # as training does beside this, in the order of the steps
        loading.read_state(folder, PEER)
        return manifest.step

    assert run_folder.use(run, "newest", action) == 9


def test_one_that_is_there_and_cannot_be_read_is_not_passed_over(run: Path) -> None:
    def action(manifest: checkpoint.Manifest) -> None:
        raise CheckpointError("refused")

    with pytest.raises(CheckpointError, match="refused"):
        run_folder.use(run, "newest", action)

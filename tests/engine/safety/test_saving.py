"""Checkpoints are written beside training, whole or not at all, and neither a full nor a slow disk ends a run."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import re
import resource
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from engine.config import RunConfig
from engine.files import sync
from engine.reporting.tracking import read_metrics
from engine.safety import checkpoint, loading, saving
from engine.safety.checkpoint import Best, Manifest, Standing
from engine.safety.saving import NotSavedError, Saver
from tests.checkpoints import PEER, a_run
from tests.engine.safety.cohorts import a_cohort
from tests.kills import assert_same_state, final_state, numbers
from tests.runs import train_here
from tests.worlds import run_ranks, run_world


def test_the_best_is_the_first_with_the_highest_mean_top1(tiny: Path, tmp_path: Path) -> None:
    train_here(a_run(tiny, tmp_path, train={"epochs": 6}))
    scores = {
        line["step"]: sum(line[f"val/cifar_resnet8_b-{k}/top1"] for k in (0, 1)) / 2
        for line in read_metrics(tmp_path)
        if "val/disagreement" in line
    }
    best = max(scores, key=lambda step: scores[step])
    assert loading.verify(checkpoint.folder_of(tmp_path, 30)).best == Best(best, scores[best])
    assert best in checkpoint.steps_on_disk(tmp_path)


@pytest.mark.parametrize("keep", [1, 3])
def test_the_newest_and_the_best_are_kept(tiny: Path, tmp_path: Path, keep: int) -> None:
    train_here(a_run(tiny, tmp_path, checkpoint={"keep": 9, "every_steps": None}))
    # No later evaluation can be better than this.
    newest = checkpoint.folder_of(tmp_path, 10)
    checkpoint.write_manifest(newest, replace(loading.verify(newest), best=Best(5, 100.0)))
    train_here(a_run(tiny, tmp_path, train={"epochs": 6}, checkpoint={"keep": keep, "every_steps": None}))
    assert checkpoint.steps_on_disk(tmp_path) == [5, *range(35 - 5 * keep, 31, 5)]
    assert loading.verify(checkpoint.folder_of(tmp_path, 30)).best == Best(5, 100.0)


def test_leftovers_of_earlier_kills_do_not_matter_and_are_cleaned(tiny: Path, whole: Path, run: Path) -> None:
    checkpoints, newest = run / "checkpoints", checkpoint.folder_of(run, 10)
    newest.rename(checkpoints / "step_00000010.tmp")
    for name in ("step_00000004.tmp", "step_00000099.tmp", "step_00000003.1234abcd.removed"):
        shutil.copytree(checkpoint.folder_of(run, 9), checkpoints / name)
    train_here(a_run(tiny, run))
    assert_same_state(final_state(run), final_state(whole))
    assert sorted(path.name for path in checkpoints.iterdir()) == sorted(
        path.name for path in (whole / "checkpoints").iterdir()
    )


def test_a_checkpoint_that_is_there_but_damaged_is_replaced(tiny: Path, run: Path) -> None:
    (checkpoint.folder_of(run, 10) / PEER).write_bytes(b"")
    train_here(a_run(tiny, run))
    assert loading.verify(checkpoint.folder_of(run, 10)).step == 10


def save_step_5(config: RunConfig) -> None:
    saver = Saver(config.folder, a_cohort(config), print)
    saver.save(Standing(5, None, 0, {}, 0), keep=1)
    saver.wait()
    saver.close()


def test_a_damaged_one_of_a_later_step_pushes_out_none_that_is_whole(tiny: Path, run: Path) -> None:
    """A run that went on from before a damaged checkpoint may save, at a signal, before it has replaced it."""
    (checkpoint.folder_of(run, 10) / PEER).write_bytes(b"")
    shutil.rmtree(checkpoint.folder_of(run, 9))
    run_world(1, save_step_5, a_run(tiny, run))
    manifest, damaged = loading.newest(run)
    assert manifest is not None
    assert (manifest.step, len(damaged)) == (5, 1)


# -- disks that are full or slow --------------------------------------------------------------------------------------


def not_written(said: str) -> list[tuple[int, str]]:
    """The steps whose checkpoints were not written, and what was said of each."""
    lines = re.findall(
        r"^checkpoint of step (\d+) not written: (.*); (?:training goes on|nothing is .*)$", said, re.MULTILINE
    )
    return [(int(step), re.sub(r"\.[0-9a-f]{8}\.tmp", ".tmp", reason)) for step, reason in lines]


def test_training_goes_on_where_the_log_is_on_the_full_disk_too(
    tiny: Path, whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    full = open("/dev/full", "w")  # noqa: SIM115
    with monkeypatch.context() as patch:
        patch.setattr(sys, "stderr", full)
        train_here(a_run(tiny, tmp_path, log={"progress": True}))
    with contextlib.suppress(OSError):  # of what it has not taken
        full.close()
    assert numbers(tmp_path) == numbers(whole)


def test_training_goes_on_where_checkpoints_is_a_file(
    tiny: Path, whole: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "checkpoints").write_text("not a folder")
    monkeypatch.setattr(saving, "AGAIN", ())
    with pytest.raises(NotSavedError, match="step 10, the last, could not be saved"):
        train_here(a_run(tiny, tmp_path))
    at = tmp_path / "checkpoints"
    expected = [(step, f"{at}/step_{step:08d}.tmp: Not a directory") for step in (3, 5, 6, 9, 10)]
    assert not_written(capsys.readouterr().err) == expected
    assert numbers(tmp_path) == numbers(whole)


def train_trying_once(config: RunConfig) -> None:
    saving.AGAIN = ()
    train_here(config)


def test_training_goes_on_on_all_ranks_where_checkpoints_is_a_file(tiny: Path, tmp_path: Path) -> None:
    (tmp_path / "checkpoints").write_text("not a folder")
    with pytest.raises(RuntimeError, match=r"NotSavedError: .* step 5, the last, could not be saved"):
        run_ranks(2, train_trying_once, a_run(tiny, tmp_path, train={"epochs": 1}))
    assert read_metrics(tmp_path)[-1]["step"] == 5
    assert (tmp_path / "checkpoints").read_text() == "not a folder"


@pytest.fixture
def small_disk(tmp_path: Path, whole: Path) -> Iterator[Path]:
    """A folder on a disk with room for one and a half checkpoints and what else a run writes."""
    size = sum(path.stat().st_size for path in checkpoint.folder_of(whole, 10).iterdir())
    disk = tmp_path / "disk"
    disk.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", f"size={int(1.6 * size)}", "none", str(disk)]
    if subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("needs leave to mount a tmpfs")
    yield disk
    subprocess.run(["umount", str(disk)], check=True)


@pytest.mark.parametrize("ranks", [1, 2])
def test_a_full_disk_leaves_the_last_checkpoint_whole_and_training_goes_on(
    tiny: Path, small_disk: Path, tmp_path: Path, ranks: int
) -> None:
    run = tmp_path / "run"
    run.mkdir()
    (run / "checkpoints").symlink_to(small_disk)
    said = run_ranks(ranks, train_and_listen, a_run(tiny, run), tmp_path / "said", timeout=240)[0]
    failures = not_written(said)
    assert [step for step, _ in failures] == [5, 6, 9, 10, 10]
    for step, reason in failures:  # Of two ranks, which fill the disk together, either may meet its end.
        pattern = (
            rf"{run}/checkpoints/step_{step:08d}\.tmp/(peer_cifar_resnet8_b-[01]|shared)\.pt: No space left on device"
        )
        assert re.fullmatch(pattern, reason)
    assert read_metrics(run)[-1]["step"] == 10
    assert [path.name for path in small_disk.iterdir()] == ["step_00000003"]
    assert loading.verify(checkpoint.folder_of(run, 3)).step == 3


def test_a_run_on_a_full_disk_goes_on_with_all_its_metrics(
    tiny: Path, whole: Path, small_disk: Path, tmp_path: Path
) -> None:
    """Checkpoints, metrics and all else on one disk, which a checkpoint beside training fills now and then."""
    run_ranks(2, train_and_listen, a_run(tiny, small_disk, train={"epochs": 2}), tmp_path / "said", timeout=240)
    assert [line["step"] for line in read_metrics(small_disk)] == [line["step"] for line in read_metrics(whole)]
    assert checkpoint.steps_on_disk(small_disk)
    for step in checkpoint.steps_on_disk(small_disk):
        assert loading.verify(checkpoint.folder_of(small_disk, step)).step == step


def train_and_listen(config: RunConfig, at: Path, largest_file: int | None = None) -> str:
    """Trains; returns what this rank wrote to stderr."""
    if largest_file:
        resource.setrlimit(resource.RLIMIT_FSIZE, (largest_file, largest_file))
    path = at.with_name(f"{at.name}_{os.environ['RANK']}")
    with path.open("w") as file:
        before = os.dup(2)
        os.dup2(file.fileno(), 2)
        saving.AGAIN = (0.0,)
        try:
            train_here(config)
        except NotSavedError as error:
            assert str(error).startswith(f"{config.folder}: step 10, the last, could not be saved")  # noqa: PT017
        finally:
            os.dup2(before, 2)
    return path.read_text()


@pytest.mark.parametrize("ranks", [1, 2])
def test_a_disk_that_takes_no_file_of_that_size_leaves_no_traces(tiny: Path, tmp_path: Path, ranks: int) -> None:
    """The kernel's limit on file sizes needs no privileges; peers' files are larger, those of the metrics smaller."""
    config = a_run(tiny, tmp_path / "run")
    said = run_ranks(ranks, train_and_listen, config, tmp_path / "said", 20_000, timeout=240)[0]
    too_large = f"{tmp_path}/run/checkpoints/step_{{:08d}}.tmp/peer_cifar_resnet8_b-0.pt: File too large"
    assert not_written(said) == [(step, too_large.format(step)) for step in (3, 5, 6, 9, 10, 10)]
    assert read_metrics(tmp_path / "run")[-1]["step"] == 10
    assert not list((tmp_path / "run" / "checkpoints").iterdir())


def test_a_disk_that_has_room_again_gets_the_next_checkpoint(
    tiny: Path, whole: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Room comes and goes with the limit on file sizes, which the run itself meets when its files are synced."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)

    def save(saver: Saver, standing: Standing, keep: int, hindrance: str | None, *, last: bool) -> None:
        saver.wait()
        resource.setrlimit(resource.RLIMIT_FSIZE, (20_000 if standing.step in (5, 6) else limits[0], limits[1]))
        whole_save(saver, standing, keep, hindrance, last=last)

    whole_save = Saver.save
    monkeypatch.setattr(Saver, "save", save)
    try:
        train_here(a_run(tiny, tmp_path))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert [step for step, _ in not_written(capsys.readouterr().err)] == [5, 6]
    assert_same_state(final_state(tmp_path), final_state(whole))
    assert checkpoint.leftovers(tmp_path) == []


def test_the_last_checkpoint_is_tried_again_while_its_writing_fails(
    tiny: Path, whole: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A folder in the way of its name, which somebody takes away after the first try."""
    monkeypatch.setattr(saving, "AGAIN", (0.1, 0.1))
    tries, complete = [], saving._complete

    def fail_once(aside: Path, target: Path, manifest: Manifest) -> None:
        if manifest.step == 10:
            tries.append(manifest.step)
            if len(tries) == 1:
                raise OSError(28, "No space left on device", str(target))
        complete(aside, target, manifest)

    monkeypatch.setattr(saving, "_complete", fail_once)
    train_here(a_run(tiny, tmp_path))
    assert not_written(capsys.readouterr().err) == [
        (10, f"{tmp_path}/checkpoints/step_00000010: No space left on device")
    ]
    assert_same_state(final_state(tmp_path), final_state(whole))


def test_a_wait_for_a_slow_disk_is_told(
    tiny: Path, whole: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(saving, "PATIENCE", 0.05)
    monkeypatch.setattr(saving, "sync", lambda path: (time.sleep(0.1), sync(path)))
    train_here(a_run(tiny, tmp_path))
    said = capsys.readouterr().err
    assert f"training waits for the checkpoint of step 5, which has been written to {tmp_path} for 0 s; if the" in said
    assert_same_state(final_state(tmp_path), final_state(whole))
    assert numbers(tmp_path) == numbers(whole)


def test_the_manifest_names_what_was_written(whole: Path) -> None:
    at = checkpoint.folder_of(whole, 10)
    for name, entry in loading.verify(at).files.items():
        data = (at / name).read_bytes()
        assert (entry.size, entry.sha256) == (len(data), hashlib.sha256(data).hexdigest())
    raw = json.loads((at / "manifest.json").read_text())
    signature = raw.pop("sha256")
    assert signature == hashlib.sha256(json.dumps(raw, sort_keys=True).encode()).hexdigest()

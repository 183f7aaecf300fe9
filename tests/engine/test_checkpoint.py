"""Checkpoints on disk: every kind of damage is named, the one before is used, and a full disk does not end a run."""

from __future__ import annotations

import json
import pickle
import shutil
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from engine import checkpoint
from engine.checkpoint import Best, CheckpointError
from engine.config import RunConfig
from engine.files import digest
from engine.tracking import read_metrics
from tests.kills import assert_same_state, final_state, numbers
from tests.runs import small_run, train_here
from tests.worlds import run_ranks

PEER = "peer_cifar_resnet8_b-1.pt"


@pytest.fixture(scope="module", autouse=True)
def _one_thread() -> Iterator[None]:
    """As a rank among others has, and quicker for networks this small."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def a_run(tiny: Path, folder: Path, **sections: Any) -> RunConfig:
    """2 epochs of 5 steps on one rank, with a checkpoint of steps 9 and 10 left at the end."""
    return small_run(tiny, folder, **{"checkpoint": {"every_steps": 3}, **sections})


@pytest.fixture(scope="module")
def whole(tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that came to its end."""
    folder = tmp_path_factory.mktemp("whole")
    train_here(a_run(tiny, folder))
    assert checkpoint.steps_on_disk(folder)[-2:] == [9, 10]
    return folder


@pytest.fixture
def run(whole: Path, tmp_path: Path) -> Path:
    """A copy of it to damage."""
    return Path(shutil.copytree(whole, tmp_path / "run"))


def edit(path: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    raw = json.loads(path.read_text())
    path.write_text(json.dumps(change(raw) or raw))


def cut_short(folder: Path) -> None:
    (folder / PEER).write_bytes((folder / PEER).read_bytes()[:-100])


def flip_a_bit(folder: Path) -> None:
    data = bytearray((folder / PEER).read_bytes())
    data[len(data) // 2] ^= 0b100
    (folder / PEER).write_bytes(data)


def name_a_file_outside(folder: Path) -> None:
    (folder.parent / "escape").write_bytes((folder / "shared.pt").read_bytes())
    edit(folder / "manifest.json", lambda raw: raw["files"].update({"../escape": digest(folder.parent / "escape")}))


DAMAGES: dict[str, tuple[Callable[[Path], Any], str]] = {
    "peer_cut_short": (cut_short, f"{{at}}/{PEER}: cut short or altered: {{size}} bytes expected, {{less}} found"),
    "bit_flipped": (flip_a_bit, f"{{at}}/{PEER}: altered: its SHA-256 is not the one in the manifest"),
    "peer_missing": (lambda at: (at / PEER).unlink(), f"{{at}}/{PEER}: missing"),
    "shared_missing": (lambda at: (at / "shared.pt").unlink(), "{at}/shared.pt: missing"),
    "manifest_missing": (
        lambda at: (at / "manifest.json").unlink(),
        "{at}/manifest.json: missing; the checkpoint was not finished",
    ),
    "manifest_empty": (
        lambda at: (at / "manifest.json").write_text(""),
        "{at}/manifest.json: not a manifest: Expecting value: line 1 column 1 (char 0)",
    ),
    "manifest_binary": (
        lambda at: (at / "manifest.json").write_bytes(b"\xff\x00"),
        "{at}/manifest.json: not a manifest: 'utf-8' codec can't decode byte 0xff in position 0: invalid start byte",
    ),
    "manifest_of_another_shape": (
        lambda at: edit(at / "manifest.json", lambda raw: raw.update(files=[PEER])),
        "{at}/manifest.json: not a manifest: 'list' object has no attribute 'items'",
    ),
    "manifest_without_hashes": (
        lambda at: edit(at / "manifest.json", lambda raw: raw["files"][PEER].pop("sha256") and None),
        "{at}/manifest.json: not a manifest: 'sha256'",
    ),
    "manifest_does_not_name_a_peer": (
        lambda at: edit(at / "manifest.json", lambda raw: raw["files"].pop(PEER) and None),
        f"{{at}}/manifest.json: does not name {PEER}",
    ),
    "other_version": (
        lambda at: edit(at / "manifest.json", lambda raw: raw.update(version=2)),
        "{at}/manifest.json: version 2; this program reads version 1",
    ),
    "names_a_file_outside": (
        name_a_file_outside,
        "{at}/manifest.json: names a file outside the checkpoint: '../escape'",
    ),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_damage_is_named_and_the_checkpoint_before_is_used(
    tiny: Path, whole: Path, run: Path, capsys: pytest.CaptureFixture[str], damage: str
) -> None:
    inflict, message = DAMAGES[damage]
    newest = checkpoint.folder_of(run, 10)
    size = (newest / PEER).stat().st_size
    inflict(newest)
    expected = message.format(at=newest, size=size, less=size - 100)

    with pytest.raises(CheckpointError) as error:
        checkpoint.verify(newest)
    assert str(error.value) == expected
    manifest, damaged = checkpoint.newest(run)
    assert manifest is not None
    assert (manifest.step, damaged) == (9, [expected])

    train_here(a_run(tiny, run))
    said = capsys.readouterr().err
    assert f"not used: {expected}\n" in said
    assert "going on at step 9 of 10" in said
    assert_same_state(final_state(run), final_state(whole))
    assert numbers(run) == numbers(whole)


def test_a_run_whose_checkpoints_are_all_damaged_begins_again_and_names_each(
    tiny: Path, whole: Path, run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for step in checkpoint.steps_on_disk(run):
        (checkpoint.folder_of(run, step) / PEER).unlink()
    damaged = len(checkpoint.steps_on_disk(run))
    train_here(a_run(tiny, run))
    said = capsys.readouterr().err
    assert said.count("not used: ") == damaged
    assert "going on" not in said
    assert_same_state(final_state(run), final_state(whole))
    assert numbers(run) == numbers(whole)


class Harmful:
    """What a pickle may do when it is loaded."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return Path.write_text, (self.path, "executed")


@pytest.fixture
def foreign(run: Path) -> Path:
    """The newest checkpoint's second peer file is a harmful pickle, and the manifest agrees with it."""
    newest = checkpoint.folder_of(run, 10)
    (newest / PEER).write_bytes(pickle.dumps(Harmful(run / "harm"), protocol=2))
    edit(newest / "manifest.json", lambda raw: raw["files"].update({PEER: digest(newest / PEER)}))
    return newest


def test_a_foreign_pickle_with_a_matching_hash_would_be_harmful(foreign: Path) -> None:
    pickle.loads((foreign / PEER).read_bytes())
    assert (foreign.parents[1] / "harm").read_text() == "executed"


def test_a_foreign_pickle_with_a_matching_hash_is_refused_and_not_executed(
    tiny: Path, run: Path, foreign: Path
) -> None:
    assert checkpoint.verify(foreign).step == 10
    with pytest.raises(CheckpointError) as error:
        train_here(a_run(tiny, run))
    assert str(error.value).startswith(
        f"{foreign / PEER}: refused, as it is no file of tensors and nothing in it is executed: "
    )
    assert not (run / "harm").exists()


def test_a_checkpoint_that_one_rank_cannot_load_is_refused_by_all_ranks_alike(
    tiny: Path, run: Path, foreign: Path
) -> None:
    of_rank_0, of_rank_1 = run_ranks(2, tell_refusal, a_run(tiny, run), timeout=60)
    assert of_rank_0 == of_rank_1
    assert of_rank_0.startswith(f"{foreign / PEER}: refused, as it is no file of tensors")


def tell_refusal(config: RunConfig) -> str:
    try:
        train_here(config)
    except CheckpointError as error:
        return str(error)
    return "none"


@pytest.mark.parametrize("content", [b"", b"no tensors at all"])
def test_a_peer_file_that_is_no_file_of_tensors_is_refused(tiny: Path, run: Path, content: bytes) -> None:
    newest = checkpoint.folder_of(run, 10)
    (newest / PEER).write_bytes(content)
    edit(newest / "manifest.json", lambda raw: raw["files"].update({PEER: digest(newest / PEER)}))
    with pytest.raises(CheckpointError) as error:
        train_here(a_run(tiny, run))
    assert str(error.value).startswith(f"{newest / PEER}: refused, as it is no file of tensors")


def test_a_checkpoint_of_other_peers_is_refused(tiny: Path, run: Path) -> None:
    (run / "config.yaml").unlink()  # Which would have refused it earlier.
    peers = [{"network": "cifar_resnet8_b", "name": name, "options": {"width": 4}} for name in ("a", "b")]
    with pytest.raises(CheckpointError) as error:
        train_here(a_run(tiny, run, peers=peers))
    assert str(error.value) == (
        f"{checkpoint.folder_of(run, 10)}: of the peers cifar_resnet8_b-0, cifar_resnet8_b-1; expected a, b"
    )


def test_a_checkpoint_of_another_method_is_refused(tiny: Path, run: Path) -> None:
    (run / "config.yaml").unlink()
    with pytest.raises(CheckpointError) as error:
        train_here(a_run(tiny, run, method={"name": "independent"}))
    assert str(error.value) == f"{checkpoint.folder_of(run, 10)}: of method dml; expected independent"


def test_the_best_is_the_first_with_the_highest_mean_top1(tiny: Path, tmp_path: Path) -> None:
    train_here(a_run(tiny, tmp_path, train={"epochs": 6}))
    scores = {
        line["step"]: sum(line[f"val/cifar_resnet8_b-{k}/top1"] for k in (0, 1)) / 2
        for line in read_metrics(tmp_path)
        if "val/disagreement" in line
    }
    best = max(scores, key=lambda step: scores[step])
    assert checkpoint.verify(checkpoint.folder_of(tmp_path, 30)).best == Best(best, scores[best])
    assert best in checkpoint.steps_on_disk(tmp_path)


@pytest.mark.parametrize("keep", [1, 3])
def test_the_newest_and_the_best_are_kept(tiny: Path, tmp_path: Path, keep: int) -> None:
    train_here(a_run(tiny, tmp_path, checkpoint={"keep": 9, "every_steps": None}))
    # No later evaluation can be better than this.
    manifest = checkpoint.folder_of(tmp_path, 10) / "manifest.json"
    edit(manifest, lambda raw: raw.update(best={"step": 5, "top1": 100.0}))
    train_here(a_run(tiny, tmp_path, train={"epochs": 6}, checkpoint={"keep": keep, "every_steps": None}))
    assert checkpoint.steps_on_disk(tmp_path) == [5, *range(35 - 5 * keep, 31, 5)]
    assert checkpoint.verify(checkpoint.folder_of(tmp_path, 30)).best == Best(5, 100.0)


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
    cut_short(checkpoint.folder_of(run, 10))
    train_here(a_run(tiny, run))
    assert checkpoint.verify(checkpoint.folder_of(run, 10)).step == 10


def test_training_goes_on_where_checkpoints_is_a_file(tiny: Path, whole: Path, tmp_path: Path) -> None:
    (tmp_path / "checkpoints").write_text("not a folder")
    with pytest.warns(UserWarning, match=r"checkpoint of step \d+ not written: .*checkpoints.*; training goes on$"):
        train_here(a_run(tiny, tmp_path))
    assert numbers(tmp_path) == numbers(whole)


def test_training_goes_on_on_all_ranks_where_checkpoints_is_a_file(tiny: Path, tmp_path: Path) -> None:
    (tmp_path / "checkpoints").write_text("not a folder")
    run_ranks(2, train_here, a_run(tiny, tmp_path, train={"epochs": 1}), timeout=60)
    assert read_metrics(tmp_path)[-1]["step"] == 5
    assert (tmp_path / "checkpoints").read_text() == "not a folder"


@pytest.fixture
def small_disk(tmp_path: Path, whole: Path) -> Iterator[Path]:
    """A run's folder whose checkpoints lie on a disk with room for one and a half of them."""
    size = sum(path.stat().st_size for path in checkpoint.folder_of(whole, 10).iterdir())
    disk = tmp_path / "checkpoints"
    disk.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", f"size={int(1.6 * size)}", "none", str(disk)]
    if subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("needs leave to mount a tmpfs")
    yield tmp_path
    subprocess.run(["umount", str(disk)], check=True)


@pytest.mark.parametrize("ranks", [1, 2])
def test_a_full_disk_leaves_the_last_checkpoint_whole_and_training_goes_on(
    tiny: Path, small_disk: Path, ranks: int
) -> None:
    config = a_run(tiny, small_disk)
    if ranks == 1:
        with pytest.warns(UserWarning, match=r"checkpoint of step \d+ not written: .*; training goes on$") as warned:
            train_here(config)
        assert [str(warning.message).split()[3] for warning in warned] == ["5", "6", "9", "10"]
    else:
        run_ranks(ranks, train_here, config, timeout=60)
    assert read_metrics(small_disk)[-1]["step"] == 10
    assert [path.name for path in (small_disk / "checkpoints").iterdir()] == ["step_00000003"]
    assert checkpoint.verify(checkpoint.folder_of(small_disk, 3)).step == 3

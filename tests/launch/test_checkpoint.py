"""launch/checkpoint.py: what it lists, finds, shows and removes."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from engine.safety import checkpoint, loading
from engine.safety.checkpoint import Best
from tests.checkpoints import PEER, a_run, change_state
from tests.launch.command import run_command
from tests.runs import train_here

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def whole(tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run with checkpoints of the steps 3, 5, 6, 9 and 10, the best of them 5 in the eyes of the newest."""
    folder = tmp_path_factory.mktemp("whole")
    train_here(a_run(tiny, folder, checkpoint={"every_steps": 3, "keep": 9}))
    newest = checkpoint.folder_of(folder, 10)
    checkpoint.write_manifest(newest, replace(loading.verify(newest), best=Best(5, 99.0)))
    return folder


@pytest.fixture
def run(whole: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(whole, tmp_path / "run"))


def flip_a_bit(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


def leftover(run: Path, name: str, age: float) -> Path:
    """A folder that a kill left, last changed some seconds ago."""
    folder = Path(shutil.copytree(checkpoint.folder_of(run, 3), run / "checkpoints" / name))
    for path in (*folder.iterdir(), folder):
        os.utime(path, (time.time() - age, time.time() - age))
    return folder


def test_ls_lists_steps_with_epochs_the_best_and_what_is_damaged(run: Path) -> None:
    (checkpoint.folder_of(run, 9) / PEER).unlink()
    leftover(run, "step_00000012.tmp", 0)
    _, out, _ = run_command("checkpoint", "ls", str(run))
    header, *lines, rest = out.splitlines()
    assert header.split() == ["step", "epoch", "size", "written", "ago", "state"]
    assert [line.split()[:2] for line in lines] == [["3", "0.6"], ["5", "1"], ["6", "1.2"], ["9", "1.8"], ["10", "2"]]
    assert [line.split()[0] for line in lines if " best " in line] == ["5"]
    assert [line.split()[0] for line in lines if line.endswith("  whole")] == ["3", "5", "6", "10"]
    assert lines[3].endswith(f"damaged: {checkpoint.folder_of(run, 9)}/{PEER}: missing")
    assert rest.startswith("not finished: step_00000012.tmp, ")


def test_ls_says_that_the_best_is_gone(run: Path) -> None:
    checkpoint.remove(checkpoint.folder_of(run, 5))
    assert "the best was that of step 5, which is not on disk\n" in run_command("checkpoint", "ls", str(run))[1]


def test_verify_finds_one_bit_and_ends_with_1(run: Path) -> None:
    code, out, _ = run_command("checkpoint", "verify", str(run))
    assert code == 0
    assert re.fullmatch(r"(step \d+: whole, 3 files, \S+ KB\n){5}", out)
    flip_a_bit(checkpoint.folder_of(run, 5) / PEER)
    for which in ("all", "best", "5"):
        code, out, _ = run_command("checkpoint", "verify", str(run), "--checkpoint", which, check=False)
        assert code == 1
        assert f"step 5: DAMAGED: {checkpoint.folder_of(run, 5)}/{PEER}: altered: its SHA-256" in out
    for which in ("newest", "10"):
        assert run_command("checkpoint", "verify", str(run), "--checkpoint", which)[1].startswith("step 10: whole, ")


def test_show_prints_every_tensor_with_shape_format_and_number(run: Path) -> None:
    at = checkpoint.folder_of(run, 10)
    _, out, _ = run_command("checkpoint", "show", str(run))
    assert f"{at}\n  method   dml\n" in out
    assert "best     step 5, mean top-1 99.00 %" in out
    for name in loading.verify(at).files:
        assert f"\n{name}: " in out
    network = loading.read_state(at, PEER)["network"]
    of_peer = out.partition(f"\n{PEER}: ")[2]
    assert f"network: {sum(weight.numel() for weight in network.values()):,} numbers\n" in of_peer
    for key, weight in network.items():
        dtype = str(weight.dtype).removeprefix("torch.")
        row = rf"    {re.escape(key)} +{dtype} +{re.escape(str(list(weight.shape)))} +{weight.numel():,}\n"
        assert re.search(row, of_peer), key
    assert re.search(r"state\.0\.momentum_buffer +float32 +\[4, 1, 3, 3\] +36\n", of_peer)


def test_show_escapes_names_that_would_steer_a_terminal(run: Path) -> None:
    change_state(
        checkpoint.folder_of(run, 10), PEER, lambda state: state["network"].update({"\x1b[2Jx": torch.ones(1)})
    )
    _, out, _ = run_command("checkpoint", "show", str(run))
    assert "\x1b" not in out
    assert "\\x1b[2Jx" in out


def test_prune_keeps_the_newest_that_are_whole_and_the_best(run: Path) -> None:
    flip_a_bit(checkpoint.folder_of(run, 9) / "shared.pt")
    old, fresh = leftover(run, "step_00000004.tmp", 7200), leftover(run, "step_00000012.tmp", 60)
    before = sorted(run.rglob("*"))
    going = ["step_00000003", "step_00000009", old.name]
    _, out, _ = run_command("checkpoint", "prune", str(run), "--keep", "2", "--dry-run")
    assert [line.split()[2].strip(",") for line in out.splitlines() if line.startswith("would remove")] == going
    assert f"damaged: {checkpoint.folder_of(run, 9)}/shared.pt: altered" in out
    assert f"left alone, as it may be being written: {fresh.name}\n" in out
    assert sorted(run.rglob("*")) == before

    run_command("checkpoint", "prune", str(run), "--keep", "2")
    assert checkpoint.steps_on_disk(run) == [5, 6, 10]
    assert checkpoint.leftovers(run) == [fresh]
    run_command("checkpoint", "prune", str(run), "--keep", "1")
    assert checkpoint.steps_on_disk(run) == [5, 10]


def test_prune_never_removes_the_last_that_is_whole(run: Path) -> None:
    for step in (5, 6, 9, 10):
        flip_a_bit(checkpoint.folder_of(run, step) / PEER)
    run_command("checkpoint", "prune", str(run), "--keep", "1")
    assert checkpoint.steps_on_disk(run) == [3]
    flip_a_bit(checkpoint.folder_of(run, 3) / PEER)
    assert "none is whole, so none is removed" in run_command("checkpoint", "prune", str(run), "--keep", "1")[1]
    assert checkpoint.steps_on_disk(run) == [3]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            ["ls", "{at}/nowhere"],
            "{at}/nowhere: holds no checkpoints; expected the folder of a run that has saved some",
        ),
        (
            ["show", "{at}/run", "--checkpoint", "7"],
            "--checkpoint 7: expected newest, best or a step; {at}/run has the steps 3, 5, 6, 9, 10",
        ),
        (["prune", "{at}/run", "--keep", "0"], "argument --keep: expected a number of at least 1, found '0'"),
        (["prune", "{at}/run"], "the following arguments are required: --keep"),
    ],
)
def test_mistakes(run: Path, arguments: list[str], message: str) -> None:
    code, _, err = run_command("checkpoint", *(a.format(at=run.parent) for a in arguments), check=False)
    assert code == 2
    assert err.splitlines()[0] == f"error: {message.format(at=run.parent)}"


def test_as_a_command_of_its_own(run: Path) -> None:
    flip_a_bit(checkpoint.folder_of(run, 10) / PEER)
    command = [sys.executable, "launch/checkpoint.py", "verify", str(run)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=240)
    assert (done.returncode, done.stdout.count("whole"), done.stderr) == (1, 4, "")

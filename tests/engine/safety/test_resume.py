"""Promise 3: a killed run goes on as if nothing had happened. Real ranks, real kills, real files."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from engine.config import RunConfig
from engine.config.loading import dump
from engine.files import digest
from engine.safety import checkpoint, loading
from tests.kills import (
    assert_same_state,
    chance,
    final_state,
    kill_after_step,
    kill_run,
    last_step,
    numbers,
)
from tests.marks import slow
from tests.runs import small_run, train_here
from tests.worlds import run_ranks

ROOT = Path(__file__).parents[3]
STEPS = 20


def a_run(tiny: Path, folder: Path, method: str, peers: int = 2, **sections: Any) -> RunConfig:
    """4 epochs of 5 steps; a line of metrics every step, a checkpoint every 3."""
    sections = {
        "train": {"epochs": 4, "ema_decay": 0.9},
        "checkpoint": {"every_steps": 3},
        "log": {"every_steps": 1},
        **sections,
    }
    return small_run(tiny, folder, {"name": method}, peers, **sections)


@pytest.fixture(scope="module")
def undisturbed(tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """The folder of a run that nobody killed; once for each (method, peers, ranks, further sections)."""
    done: dict[Any, Path] = {}

    def train(method: str, peers: int, ranks: int, **sections: Any) -> Path:
        key = (method, peers, ranks, str(sections))
        if key not in done:
            done[key] = tmp_path_factory.mktemp("undisturbed")
            run_ranks(ranks, train_here, a_run(tiny, done[key], method, peers, **sections))
        return done[key]

    return train


def assert_goes_on_as_if_nothing_happened(folder: Path, undisturbed: Path) -> None:
    assert_same_state(final_state(folder), final_state(undisturbed))
    assert numbers(folder) == numbers(undisturbed)


def test_an_undisturbed_run_writes_each_step_once_and_each_evaluation_once(undisturbed: Any) -> None:
    """What the comparisons below compare with."""
    lines = numbers(undisturbed("dml", 2, 2))
    assert [line["step"] for line in lines if "lr" in line] == list(range(1, STEPS + 1))
    assert [line["step"] for line in lines if "val/disagreement" in line] == [5, 10, 15, 20]
    assert len(lines) == STEPS + 4
    state = final_state(undisturbed("dml", 2, 2))
    for part in ("network", "optimizer", "ema"):
        assert any(key.startswith(f"peer_cifar_resnet8_b-0.pt/{part}/") for key in state)


@pytest.mark.parametrize("method", ["dml", slow("independent")])
def test_a_run_killed_three_times_at_random_ends_as_the_undisturbed_one(
    tiny: Path, tmp_path: Path, undisturbed: Any, method: str
) -> None:
    config = a_run(tiny, tmp_path, method)
    for step in sorted(chance.sample(range(1, STEPS - 3), 3)):
        print(f"to be killed after step {step}")
        if last_step(tmp_path) < STEPS - 3:
            before = last_step(tmp_path)
            kill_after_step(2, config, max(step, before))
    run_ranks(2, train_here, config)
    assert_goes_on_as_if_nothing_happened(tmp_path, undisturbed(method, 2, 2))


@pytest.mark.parametrize("victim", [0, slow(1)])
def test_a_run_killed_while_a_checkpoint_is_written_ends_as_the_undisturbed_one(
    tiny: Path, tmp_path: Path, undisturbed: Any, victim: int
) -> None:
    config = a_run(tiny, tmp_path, "dml")
    checkpoints = tmp_path / "checkpoints"

    def unfinished() -> list[str]:
        return [name for name in os.listdir(checkpoints) if name.endswith(".tmp")] if checkpoints.exists() else []

    for attempt in range(10):
        kill_run(2, config, lambda: bool(unfinished()), victim=victim, mercy=0.0)
        if left := unfinished():
            print(f"attempt {attempt}: left unfinished: {left}")
            break
    else:
        pytest.fail("ten kills, and none fell into the writing of a checkpoint")
    run_ranks(2, train_here, config)
    assert_goes_on_as_if_nothing_happened(tmp_path, undisturbed("dml", 2, 2))
    assert not unfinished()


def test_a_run_killed_before_its_first_checkpoint_begins_again(tiny: Path, tmp_path: Path, undisturbed: Any) -> None:
    config = a_run(tiny, tmp_path, "dml")
    kill_run(2, config, lambda: last_step(tmp_path) >= 1, victim=0, mercy=0.0)
    # What it may have saved meanwhile is taken away, with lines of metrics up to there left behind.
    for step in checkpoint.steps_on_disk(tmp_path):
        checkpoint.folder_of(tmp_path, step).rename(tmp_path / f"elsewhere_{step}")
    assert last_step(tmp_path) >= 1
    run_ranks(2, train_here, config)
    assert_goes_on_as_if_nothing_happened(tmp_path, undisturbed("dml", 2, 2))


def test_three_replicas_add_up_in_the_same_order_after_a_kill(tiny: Path, tmp_path: Path, undisturbed: Any) -> None:
    """A sum of three numbers, unlike one of two, depends on its order, which DDP's layout of buckets decides."""
    config = a_run(tiny, tmp_path, "dml", placement={"kind": "colocated"})
    kill_after_step(3, config, 7)
    run_ranks(3, train_here, config)
    assert_goes_on_as_if_nothing_happened(tmp_path, undisturbed("dml", 2, 3, placement={"kind": "colocated"}))


def test_a_run_goes_on_in_the_middle_of_an_epoch(tiny: Path, tmp_path: Path, undisturbed: Any) -> None:
    """Its order and augmentation must go on with the batch that is next, not with the epoch's first."""
    config = a_run(tiny, tmp_path, "dml")
    kill_run(2, config, lambda: 6 in checkpoint.steps_on_disk(tmp_path), victim=1, mercy=0.0)
    for step in checkpoint.steps_on_disk(tmp_path):
        if step > 6:
            checkpoint.folder_of(tmp_path, step).rename(tmp_path / f"elsewhere_{step}")
    manifest, damaged = loading.newest(tmp_path)
    assert manifest is not None
    assert (manifest.step, damaged) == (6, [])
    run_ranks(2, train_here, config)
    assert_goes_on_as_if_nothing_happened(tmp_path, undisturbed("dml", 2, 2))


def test_a_line_cut_short_by_a_kill_is_written_again(tiny: Path, tmp_path: Path, undisturbed: Any) -> None:
    config = a_run(tiny, tmp_path, "dml")
    kill_after_step(2, config, 8)
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 9, "epoch": 1.8, "lr": 0.04')
    run_ranks(2, train_here, config)
    assert_goes_on_as_if_nothing_happened(tmp_path, undisturbed("dml", 2, 2))


@pytest.mark.parametrize(
    ("method", "peers", "before", "after", "kind"),
    [
        ("dml", 2, 2, 1, "auto"),
        slow("dml", 2, 1, 2, "auto"),
        slow("independent", 2, 2, 1, "auto"),
        slow("independent", 2, 1, 2, "auto"),
        slow("dml", 3, 3, 1, "auto"),
        slow("dml", 4, 4, 2, "auto"),
        # Two replicas before and after, so that BatchNorm sees the same rows.
        ("dml", 2, 4, 2, "colocated"),
    ],
)
def test_a_killed_run_goes_on_on_another_number_of_ranks(
    tiny: Path, tmp_path: Path, undisturbed: Any, method: str, peers: int, before: int, after: int, kind: str
) -> None:
    short = {"train": {"epochs": 2, "ema_decay": 0.9}}
    when, killed = chance.randrange(4, 7), a_run(tiny, tmp_path, method, peers, **short)
    kill_run(
        before,
        killed,
        lambda: under_way(tmp_path, when),
        victim=chance.randrange(before),
        mercy=chance.choice([0.0, 0.05, 0.3]),
    )
    assert checkpoint.steps_on_disk(tmp_path)
    run_ranks(after, train_here, a_run(tiny, tmp_path, method, peers, placement={"kind": kind}, **short))

    expected = undisturbed(method, peers, before, **short)
    assert_same_state(final_state(tmp_path), final_state(expected), relative=1e-5)
    assert [line["step"] for line in numbers(tmp_path)] == [line["step"] for line in numbers(expected)]
    for line, other in zip(numbers(tmp_path), numbers(expected), strict=True):
        assert line == pytest.approx(other, rel=1e-3, abs=1e-5)


def test_a_complete_run_started_again_changes_nothing(tiny: Path, tmp_path: Path) -> None:
    config = a_run(tiny, tmp_path, "dml", train={"epochs": 1})
    run_ranks(1, train_here, config)
    files = [path for path in tmp_path.rglob("*") if path.is_file() and path.name != "starts.json"]
    before = {path: digest(path) for path in files}
    written = {path: path.stat().st_mtime_ns for path in files if "checkpoints" in path.parts}
    assert len(written) >= 4

    run_ranks(2, train_here, config)
    assert {path for path in tmp_path.rglob("*") if path.is_file() and path.name != "starts.json"} == set(files)
    assert {path: digest(path) for path in files} == before
    assert {path: path.stat().st_mtime_ns for path in written} == written


def test_a_complete_run_goes_on_with_more_epochs(tiny: Path, tmp_path: Path) -> None:
    """train.epochs may change between two starts, and only adds steps where the schedule does not depend on it."""
    sections: dict[str, Any] = {"schedule": {"name": "constant"}}
    run_ranks(1, train_here, a_run(tiny, tmp_path / "one", "dml", train={"epochs": 1}, **sections))
    run_ranks(1, train_here, a_run(tiny, tmp_path / "one", "dml", train={"epochs": 2}, **sections))
    run_ranks(1, train_here, a_run(tiny, tmp_path / "two", "dml", train={"epochs": 2}, **sections))
    assert_goes_on_as_if_nothing_happened(tmp_path / "one", tmp_path / "two")


def under_way(folder: Path, step: int) -> bool:
    """Whether a run has come to a step and has a checkpoint to go on from, which is written beside the steps."""
    return last_step(folder) >= step and bool(checkpoint.steps_on_disk(folder))


def workers_of(launcher: int) -> list[int]:
    """The processes that torchrun started, in the order in which it did."""
    text = Path(f"/proc/{launcher}/task/{launcher}/children").read_text()
    return [int(pid) for pid in text.split() if b"launch/train.py" in Path(f"/proc/{pid}/cmdline").read_bytes()]


@pytest.mark.slow  # test_ranks.py has it for launch/ranks.py
def test_torchrun_restarts_a_worker_that_was_killed_and_the_run_goes_on(
    tiny: Path, tmp_path: Path, undisturbed: Any
) -> None:
    config = a_run(tiny, tmp_path / "run", "dml")
    (tmp_path / "run.yaml").write_text(dump(config))
    command = [sys.executable, "-m", "torch.distributed.run", "--nnodes=1", "--nproc-per-node=2", "--max-restarts=1"]
    command += ["--rdzv-backend=c10d", "--rdzv-endpoint=127.0.0.1:0", "launch/train.py", str(tmp_path / "run.yaml")]
    with (tmp_path / "output").open("w+") as output:
        torchrun = subprocess.Popen(
            command,
            cwd=ROOT,
            stdout=output,
            stderr=subprocess.STDOUT,
            env={**os.environ, "OMP_NUM_THREADS": "1"},
        )
        try:
            when = chance.randrange(4, 10)
            while torchrun.poll() is None and not under_way(config.folder, when):
                time.sleep(0.005)
            workers = workers_of(torchrun.pid)
            assert len(workers) == 2
            victim = chance.choice(workers)
            os.kill(victim, signal.SIGKILL)
            print(f"killed worker {victim} of {workers} at step {last_step(config.folder)}")
            torchrun.wait(100)
        finally:
            torchrun.terminate()  # Not killed: its workers would stay.
            torchrun.wait()
        output.seek(0)
        text = output.read()
    assert torchrun.returncode == 0, text
    assert text.count("going on at step") == 1, text
    assert_goes_on_as_if_nothing_happened(config.folder, undisturbed("dml", 2, 2))

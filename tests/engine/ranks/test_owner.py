"""A folder belongs to one run at a time. Real processes and files."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from engine import start, trainer
from engine.config import ConfigError, RunConfig
from engine.ranks import owner
from engine.ranks.collectives import Launch
from engine.ranks.owner import FolderLostError, Owner, take
from engine.reporting.tracking import read_metrics
from engine.safety import checkpoint
from engine.trainer import train
from tests.kills import last_step, running
from tests.runs import small_run, train_here
from tests.worlds import run_ranks


def never() -> bool:
    return False


def take_it(folder: Path, said: list[str] | None = None) -> Owner:
    return take(folder, "dir", never, (said if said is not None else []).append)


def take_and_die(folder: Path) -> None:
    take_it(folder)
    os._exit(3)


def wait_until(due: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 240
    while not due():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def leave(folder: Path, **about: Any) -> Path:
    """What an owner leaves behind: this process, but for what is said."""
    mine = take_it(folder)
    found = json.loads(mine.path.read_text())
    mine.release()
    (folder / "owner").mkdir()
    (folder / "owner" / "4").write_text(json.dumps({**found, "token": "theirs", **about}))
    return folder / "owner" / "4"


def test_what_was_given_back_is_free_and_leaves_nothing(tmp_path: Path) -> None:
    take_it(tmp_path).release()
    assert list(tmp_path.iterdir()) == []
    take_it(tmp_path).release()


def test_one_that_lives_is_refused_by_name(tmp_path: Path) -> None:
    first = take_it(tmp_path)
    with pytest.raises(ConfigError, match=f"^dir: is in use by process {os.getpid()} on .*, which is still running"):
        take_it(tmp_path)
    first.check()
    first.release()


@pytest.mark.parametrize("about", [{"pid": 2**22 + 1}, {"began": "1"}])
def test_a_process_of_this_machine_that_is_gone_is_succeeded_at_once(tmp_path: Path, about: dict[str, Any]) -> None:
    """It is not there, or its number is another process's by now."""
    left, since = leave(tmp_path, **about), time.monotonic()
    mine = take_it(tmp_path)
    assert time.monotonic() - since < 1
    assert (mine.path.name, left.exists()) == ("5", False)
    mine.release()


@pytest.mark.parametrize("content", [None, "", "[", "[1]"])
def test_one_of_another_machine_is_succeeded_when_it_gives_no_sign_of_life(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, content: str | None
) -> None:
    monkeypatch.setattr(owner, "SILENCE", 0.5)
    left, said = leave(tmp_path, boot="another", host="node7", pid=3), list[str]()
    if content is not None:
        left.write_text(content)
    mine = take_it(tmp_path, said)
    who = "process 3 on node7" if content is None else "another run"
    assert said == [f"dir: was in use by {who}; waiting 0.5 s for a sign of life of it"]
    mine.release()


def test_one_of_another_machine_that_lives_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Another machine's in name: it is touched by this process, as its own owner would."""
    monkeypatch.setattr(owner, "BEAT", 0.1)
    living = Owner(leave(tmp_path, boot="another", host="node7", pid=3), "theirs")
    with pytest.raises(ConfigError, match="is in use by process 3 on node7"):
        take_it(tmp_path)
    living.release()


def test_who_was_succeeded_while_cut_off_finds_out_before_it_writes_and_takes_nothing_back(tmp_path: Path) -> None:
    cut_off = take_it(tmp_path)
    cut_off.check()
    (tmp_path / "owner" / "2").write_text('{"token": "another"}')
    with pytest.raises(FolderLostError, match="another run has taken this folder over"):
        cut_off.check()
    cut_off.path.unlink()
    with pytest.raises(FolderLostError):
        cut_off.check()
    cut_off.release()
    assert [path.name for path in (tmp_path / "owner").iterdir()] == ["2"]


def test_of_many_that_come_at_once_one_has_it(tmp_path: Path) -> None:
    """After one that died, whose place they all see at the same moment."""
    with pytest.raises(RuntimeError, match=r"exit codes \[3\]"):
        run_ranks(1, take_and_die, tmp_path)
    results = run_ranks(4, try_to_take, tmp_path)
    assert sorted(results) == [False, False, False, True], results


def try_to_take(folder: Path) -> bool:
    try:
        mine = take_it(folder)
    except ConfigError:
        return False
    time.sleep(4)
    mine.check()
    mine.release()
    return True


# -- runs -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("fresh", [False, True])
def test_a_second_start_beside_a_living_run_is_refused_and_changes_nothing(
    tiny: Path, tmp_path: Path, fresh: bool
) -> None:
    config = small_run(tiny, tmp_path / "run", train={"epochs": 400}, log={"every_steps": 1})
    with running(2, config):
        wait_until(lambda: last_step(config.folder) >= 2)
        with pytest.raises(RuntimeError, match=r"is in use by process .*, which is still running"):
            run_ranks(2, train_again, config, fresh)
        before = last_step(config.folder)
        wait_until(lambda: last_step(config.folder) > before + 2)
    steps = [line["step"] for line in read_metrics(config.folder) if "lr" in line]
    assert steps == list(range(1, len(steps) + 1))
    assert [path.name for path in tmp_path.iterdir()] == ["run"]


def train_again(config: RunConfig, fresh: bool) -> None:
    train(config, Launch.from_environment(), fresh=fresh)


def test_a_run_that_has_lost_its_folder_ends_and_writes_nothing_more(tiny: Path, tmp_path: Path) -> None:
    """As one whose node was cut off, and comes back."""
    config = small_run(tiny, tmp_path, train={"epochs": 4}, checkpoint={"every_steps": 1}, log={"every_steps": 1})
    with pytest.raises(RuntimeError, match=r"FolderLostError: .*another run has taken this folder over"):
        run_ranks(2, lose_the_folder, config, 7)
    assert last_step(tmp_path) == 7
    assert checkpoint.steps_on_disk(tmp_path)[-1] == 7
    assert checkpoint.leftovers(tmp_path) == []


def lose_the_folder(config: RunConfig, step: int) -> None:
    train_step, done = trainer.train_step, iter(range(1 << 30))

    def stolen(*arguments: Any) -> Any:
        if next(done) == step and Launch.from_environment().rank == 0:
            wait_until(lambda: checkpoint.steps_on_disk(config.folder)[-1:] == [step])
            (config.folder / "owner" / "9").write_text('{"token": "a successor"}')
        return train_step(*arguments)

    trainer.train_step = stolen
    train_here(config)


def test_one_peer_twice_in_a_meeting_is_refused(tiny: Path, tmp_path: Path) -> None:
    """In folders of their own, which does not help."""

    def job(folder: str) -> RunConfig:
        placement = {"kind": "jobs", "meeting": str(tmp_path / "meeting"), "peer": "cifar_resnet8_b-0"}
        return small_run(
            tiny, tmp_path / folder, {"name": "codistillation"}, placement=placement, train={"epochs": 400}
        )

    with running(1, job("one")):
        wait_until(lambda: last_step(job("one").folder) >= 2)
        with pytest.raises(RuntimeError, match=r"placement.peer = cifar_resnet8_b-0: is in use"):
            run_ranks(1, train_here, job("other"))


def test_ranks_that_see_different_folders_are_refused_by_name(tiny: Path, tmp_path: Path) -> None:
    with pytest.raises(RuntimeError, match=r"ConfigError: dir = .*: rank 1 on .* does not see in .*/1 what rank 0 on"):
        run_ranks(2, train_in_a_folder_of_its_own, small_run(tiny, tmp_path))
    assert not (tmp_path / "0" / "metrics.jsonl").exists()


def train_in_a_folder_of_its_own(config: RunConfig) -> None:
    start.PATIENCE = 0.5
    rank = Launch.from_environment().rank
    train_here(config.model_copy(update={"dir": config.folder / str(rank)}))

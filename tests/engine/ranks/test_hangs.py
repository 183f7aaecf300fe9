"""A rank that does not answer, or fails, ends the others soon, and they say which one it was."""

from __future__ import annotations

import os
import re
import signal
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

from engine import trainer
from engine.config import RunConfig
from engine.files import write_text
from engine.ranks.collectives import Launch, group_of, limit_waiting, record_flights
from engine.ranks.heartbeat import RankLostError
from engine.ranks.placement import Placement
from tests.kills import running
from tests.marks import slow
from tests.runs import small_run, train_here
from tests.worlds import run_ranks, run_world

TIMEOUT = 2.0


def misbehave(config: RunConfig, culprit: int, how: str) -> None:
    """Trains, until a rank does something in its eighth step. Writes what the error said."""
    train_step, steps = trainer.train_step, iter(range(1 << 30))

    def step(*arguments: Any) -> Any:
        if next(steps) == 7 and Launch.from_environment().rank == culprit:
            if how == "stopped":
                os.kill(os.getpid(), signal.SIGSTOP)
            elif how == "killed":
                os.kill(os.getpid(), signal.SIGKILL)
            elif how == "busy":
                time.sleep(60)
            raise ValueError("a mistake")
        return train_step(*arguments)

    trainer.train_step = step
    try:
        train_here(config)
    except (RankLostError, ValueError) as error:
        write_text(config.folder / f"rank{Launch.from_environment().rank}", str(error))


@pytest.mark.parametrize(
    ("culprit", "how"),
    [
        *((2, how) for how in ("stopped", "killed")),
        *(slow(2, how) for how in ("failed", "busy")),
        *(slow(0, how) for how in ("stopped", "killed", "failed", "busy")),
    ],
)
def test_the_others_name_the_rank_that_is_lost(tiny: Path, tmp_path: Path, culprit: int, how: str) -> None:
    config = small_run(tiny, tmp_path, peers=3, train={"timeout": TIMEOUT})
    others = [rank for rank in range(3) if rank != culprit]
    deadline = time.monotonic() + 240
    with running(3, config, misbehave, culprit, how):
        while not all((tmp_path / f"rank{rank}").exists() for rank in others):
            assert time.monotonic() < deadline, "a rank did not end within 60 s"
            time.sleep(0.1)
    said = [(tmp_path / f"rank{rank}").read_text() for rank in others]
    expected = {
        "stopped": f"Rank {culprit} does not answer; it was last heard of at ",
        "killed": f"Rank {culprit} does not answer; it was last heard of at ",
        "failed": f"Rank {culprit} failed, step 8, data done: ValueError: a mistake.",
        "busy": f"rank {culprit}: step 8, data done",
    }[how]
    # The store is rank 0's here, and gone with it: where rank 0 is the culprit, or was done with waiting first.
    gone = "Nor does the store at 127.0.0.1"
    for rank, text in zip(others, said, strict=True):
        assert text.startswith(f"rank {rank} of 3, step 8, "), said
        assert re.search(f"{expected}|{gone}" if rank or culprit == 0 else expected, text), said


def misbehave_aloud(config: RunConfig) -> None:
    """As `misbehave`; what a rank prints goes into a file."""
    rank = Launch.from_environment().rank
    with open(config.folder / f"said{rank}", "w") as sys.stderr:
        misbehave(config, 2, "busy")


def test_a_rank_whose_program_hangs_is_named_before_the_others_give_up(tiny: Path, tmp_path: Path) -> None:
    """NCCL ends the process of who gives up, so then is too late."""
    config = small_run(tiny, tmp_path, peers=3, train={"timeout": 14.0})
    said = tmp_path / "said0"
    deadline = time.monotonic() + 240
    with running(3, config, misbehave_aloud):
        while not said.exists() or "waits" not in said.read_text():
            assert time.monotonic() < deadline, "nothing was said within 60 s"
            assert not (tmp_path / "rank0").exists(), "the rank had given up"
            time.sleep(0.1)
    assert re.search(
        r"warning: rank 0 waits: Rank 2 is behind the others: rank 1: step 8, \w+ done, for \d+ s; "
        r"rank 2: step 8, data done, for \d+ s\.\n",
        said.read_text(),
    )


def wait_in_vain(placement: Placement) -> list[str]:
    """The errors of collectives of all groups with a rank that does not come, in a world of four."""
    rank = dist.get_rank()
    mine = placement.of(rank)
    groups = [group_of(mine.replica_ranks), group_of(mine.exchange_ranks)]
    limit_waiting(0.5)
    errors = []
    if rank != 3:
        for group in (dist.group.WORLD, *groups[::-1]):
            assert group is not None
            if 3 in dist.get_process_group_ranks(group):
                try:
                    dist.all_reduce(torch.zeros(1), group=group)
                except RuntimeError as error:
                    errors.append(str(error))
    else:
        time.sleep(2.5)
    return errors


def test_every_group_waits_only_so_long() -> None:
    errors = run_world(4, wait_in_vain, Placement.even(2, 1, 4, 0))
    # Rank 1 shares its exchange group with rank 3, rank 2 its replica group.
    assert [len(of_rank) for of_rank in errors] == [1, 2, 2, 0]
    assert all("500ms" in error or "Connection closed" in error for of_rank in errors for error in of_rank), errors


def sockets_that_listen() -> list[str]:
    """The addresses, in the kernel's hexadecimal, at which this process accepts connections."""
    mine = {os.readlink(path) for path in Path("/proc/self/fd").iterdir() if path.is_symlink()}
    found = []
    for table in ("tcp", "tcp6"):
        for line in Path(f"/proc/self/net/{table}").read_text().splitlines()[1:]:
            fields = line.split()
            if fields[3] == "0A" and f"socket:[{fields[9]}]" in mine:
                found.append(fields[1])
    return found


def train_alone(config: RunConfig) -> list[str]:
    """Trains as a process that nobody launched. Returns where it listened in a step."""
    for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"):
        del os.environ[name]
    train_step, found = trainer.train_step, []

    def step(*arguments: Any) -> Any:
        found.extend(sockets_that_listen())
        return train_step(*arguments)

    trainer.train_step = step
    train_here(config)
    return found


def test_a_process_alone_accepts_no_connection_from_anywhere(tiny: Path, tmp_path: Path) -> None:
    (found,) = run_ranks(1, train_alone, small_run(tiny, tmp_path, train={"epochs": 1}))
    everywhere = [address for address in found if set(address.partition(":")[0]) == {"0"}]
    assert not everywhere, found


def test_nccl_records_flights_into_the_run_and_keeps_what_the_user_set(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TORCH_FR_BUFFER_SIZE", "7")
    for name in ("TORCH_FR_DUMP_TEMP_FILE", "TORCH_NCCL_DUMP_ON_TIMEOUT"):
        monkeypatch.setenv(name, "")  # so that it is taken back afterwards
        monkeypatch.delenv(name)
    record_flights(tmp_path / "flights")
    assert os.environ["TORCH_FR_BUFFER_SIZE"] == "7"
    assert os.environ["TORCH_FR_DUMP_TEMP_FILE"] == f"{tmp_path}/flights/rank_"
    assert os.environ["TORCH_NCCL_DUMP_ON_TIMEOUT"] == "1"

"""Ranks that wait for each other say for whom, end when a signal asks for it, and do not mind what dead ones left."""

from __future__ import annotations

import os
import re
import signal
import sys
import threading
import time
from pathlib import Path
from typing import Any

import pytest
import torch.distributed as dist

from engine import trainer
from engine.config import ConfigError, RunConfig
from engine.ranks import gathering
from engine.ranks.collectives import Launch
from engine.ranks.gathering import _in_words, gather
from engine.trainer import train
from tests.kills import running
from tests.runs import small_run, train_here
from tests.worlds import run_ranks


def wait_for_nobody(config: RunConfig, absent: list[int]) -> None:
    """Trains on ranks of which some never come; what a rank prints goes into a file."""
    launch = Launch.from_environment()
    gathering.PATIENCE = 0.5
    os.environ["LOCAL_RANK"] = "0"  # each on a machine of its own
    with open(config.folder / f"said{launch.rank}", "w") as sys.stderr:
        if launch.rank in absent:
            time.sleep(120)
        preempted = config.folder / f"preempted{launch.rank}"
        assert not train(config, launch, preempted=preempted)


@pytest.mark.parametrize(
    ("absent", "said"),
    [
        pytest.param([1], {0: "rank 0 of 3 waits for rank 1: ", 2: "rank 2 of 3 waits for rank 1: "}, id="second"),
        pytest.param(
            [0],
            {k: f"rank {k} of 3 waits for the store at 127.0.0.1:\\d+, which rank 0 or its torchrun " for k in (1, 2)},
            id="first",
            marks=pytest.mark.slow,
        ),
    ],
)
def test_who_is_missing_is_said_and_a_signal_ends_the_wait(
    tiny: Path, tmp_path: Path, absent: list[int], said: dict[int, str]
) -> None:
    config = small_run(tiny, tmp_path, peers=3)
    deadline = time.monotonic() + 240
    with running(3, config, wait_for_nobody, absent) as ranks:
        while not all(re.search(text, read(tmp_path / f"said{rank}")) for rank, text in said.items()):
            assert time.monotonic() < deadline, [read(tmp_path / f"said{rank}") for rank in said]
            time.sleep(0.05)
        # To all, as Slurm does; where rank 0 is there, one of them is enough.
        for rank in said if absent == [0] else [2]:
            os.kill(ranks[rank].pid or 0, signal.SIGTERM)
        for rank in said:
            ranks[rank].join(60)
        assert [ranks[rank].exitcode for rank in said] == [0, 0]
    if 0 in said:
        assert (tmp_path / "preempted0").read_text() == "SIGTERM\n"
        assert "signal SIGTERM before the first step: ended; there was nothing to save" in read(tmp_path / "said0")


@pytest.mark.slow
def test_rank_0_whose_store_the_others_read_in_leaves_after_them(tiny: Path, tmp_path: Path) -> None:
    config = small_run(tiny, tmp_path, peers=3)
    with running(3, config, wait_for_nobody, [1]) as ranks:
        while not all("waits for rank 1" in read(tmp_path / f"said{rank}") for rank in (0, 2)):
            time.sleep(0.05)
        os.kill(ranks[2].pid or 0, signal.SIGSTOP)
        os.kill(ranks[0].pid or 0, signal.SIGTERM)
        ranks[0].join(gathering.GRACE + 3)
        assert ranks[0].exitcode is None
        os.kill(ranks[2].pid or 0, signal.SIGCONT)
        for rank in (0, 2):
            ranks[rank].join(60)
        assert [ranks[rank].exitcode for rank in (0, 2)] == [0, 0]


def read(path: Path) -> str:
    return path.read_text() if path.exists() else ""


def meet_again_and_again() -> list[list[str]]:
    """Two ranks meet three times in a store that outlives them, and come in another order each time."""
    store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)  # type: ignore[attr-defined]
    os.environ.update(MASTER_PORT=str(store.port), TORCHELASTIC_USE_AGENT_STORE="True")
    words = []
    for late in (0, 1, 0):
        found: dict[int, Any] = {}

        def come(rank: int, late: int = late, found: dict[int, Any] = found) -> None:
            time.sleep(0.3 * (rank == late))
            word, own = gather(rank, 2, lambda: 0)
            own.set(f"from {rank}", word)
            found[rank] = own.get(f"from {1 - rank}").decode()

        ranks = [threading.Thread(target=come, args=(rank,)) for rank in range(2)]
        for rank in ranks:
            rank.start()
        for rank in ranks:
            rank.join()
        words.append([found[0], found[1]])
    # One who died while it waited has left its word as well.
    assert store.check(["token"])
    return words


def test_ranks_that_start_again_do_not_take_dead_ones_for_each_other() -> None:
    (words,) = run_ranks(1, meet_again_and_again)
    assert all(one == other for one, other in words)
    assert len({one for one, _ in words}) == 3


def stop_before_the_first_step(config: RunConfig) -> None:
    def stop(*_: Any) -> Any:
        os.kill(os.getpid(), signal.SIGSTOP)

    if Launch.from_environment().rank == 1:
        trainer.open_together = stop
    with open(config.folder / f"said{Launch.from_environment().rank}", "w") as sys.stderr:
        train_here(config)


def test_a_rank_that_is_stopped_before_its_first_step_is_named_and_ends_the_others(tiny: Path, tmp_path: Path) -> None:
    config = small_run(tiny, tmp_path, peers=3, train={"timeout": 3.0})
    with running(3, config, stop_before_the_first_step) as ranks:
        ranks[0].join(60)
        assert ranks[0].exitcode == 1
        ranks[2].join(60)
        assert ranks[2].exitcode not in (0, None)
    said = read(tmp_path / "said0")
    assert "warning: 1.5 s: Rank 1 does not answer; it was last heard of at its start.\n" in said
    assert "error: 3 s: Rank 1 does not answer; it was last heard of at its start.\n" in said


@pytest.mark.parametrize("port", ["", "http", "0", "65536"])
def test_an_address_that_is_none_is_refused(monkeypatch: pytest.MonkeyPatch, port: str) -> None:
    monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")
    monkeypatch.setenv("MASTER_PORT", port)
    with pytest.raises(ConfigError, match=f"MASTER_PORT = '{port}': expected the address and the port where"):
        gather(0, 2, lambda: 0)


def test_ranks_are_named_in_rows() -> None:
    assert _in_words([3]) == "rank 3"
    assert _in_words([1, 2, 5, 6, 7, 9]) == "ranks 1 to 2, 5 to 7, 9"

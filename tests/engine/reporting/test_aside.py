"""wandb that stops answering, a log that nobody reads: training waits for neither, and no line of metrics is lost."""

from __future__ import annotations

import contextlib
import os
import signal
import sys
import time
from pathlib import Path

import pytest

from engine.config import RunConfig
from engine.reporting.aside import Aside
from engine.reporting.console import Stderr, print_soon
from engine.reporting.tracking import Tracker, read_metrics
from tests.runs import small_run
from tests.worlds import run_ranks

LIMIT = 2.0


def children(name: str) -> list[int]:
    """The processes of a name that this one has started, and that have not ended."""
    pids = [pid for path in Path("/proc/self/task").glob("*/children") for pid in path.read_text().split()]
    return [
        int(pid)
        for pid in pids
        if f"({name}) Z" not in (text := Path(f"/proc/{pid}/stat").read_text()) and name in text
    ]


def follow_beside_a_stopped_wandb(config: RunConfig, preempted: bool) -> tuple[float, str, int]:
    """Returns: the seconds that 2,000 lines have taken, what was said, and how many of wandb's processes are left."""
    with (config.folder / "said").open("w+") as sys.stderr:
        tracker = Tracker(config, 0, 10)
        tracker.write(1, {"a": 1})
        deadline = time.monotonic() + 240
        while not list(config.folder.glob("wandb/offline-run-*/*.wandb")):
            assert time.monotonic() < deadline
            time.sleep(0.05)
        for pid in children("wandb-core"):
            os.kill(pid, signal.SIGSTOP)
        begin = time.monotonic()
        for step in range(2, 2002):
            tracker.write(step, {"a": "x" * 500})
        took = time.monotonic() - begin
        assert tracker.catch_up() is None
        if preempted:
            tracker.preempted()
        tracker.close()
        return took, (config.folder / "said").read_text(), len(children("wandb-core"))


@pytest.mark.parametrize("preempted", [True, pytest.param(False, marks=pytest.mark.slow)])
def test_wandb_that_stops_answering_holds_nothing_up(tiny: Path, tmp_path: Path, preempted: bool) -> None:
    config = small_run(tiny, tmp_path, log={"wandb": "offline", "wandb_timeout": LIMIT})
    ((took, said, left),) = run_ranks(1, follow_beside_a_stopped_wandb, config, preempted, timeout=240)
    assert took < 60, "it was waited for"
    assert [line["step"] for line in read_metrics(tmp_path)] == list(range(1, 2002))
    assert said.count(f"wandb: has not finished within {LIMIT:g} s; metrics are in {tmp_path}/metrics.jsonl") == 1, said
    assert left == 0, said


def print_into_full_pipes() -> str:
    """Returns: what standard output has answered."""
    for number in (1, 2):
        _, end = os.pipe()
        os.set_blocking(end, False)
        with contextlib.suppress(BlockingIOError):
            while True:
                os.write(end, b"x" * 4096)
        os.set_blocking(end, True)
        os.dup2(end, number)
    stderr = Stderr()
    for _ in range(3000):
        stderr.write("a line\n")
    stderr.close()
    try:
        print_soon("a table\n")
    except OSError as error:
        return str(error)
    return ""


@pytest.mark.slow
def test_pipes_that_nobody_reads_hold_nothing_up() -> None:
    assert run_ranks(1, print_into_full_pipes, timeout=240) == ["nobody has taken it for 3 s"]


def test_what_is_done_aside_is_done_in_order_and_what_finds_no_room_is_refused() -> None:
    read, write = os.pipe()
    done: list[int] = []
    aside = Aside("test", 2)
    assert aside.do(lambda: os.read(read, 1))
    while not aside.busy:
        time.sleep(0.001)
    assert aside.do(lambda: done.append(1))
    assert aside.do(lambda: done.append(2))
    assert not aside.do(lambda: done.append(3))
    assert not aside.wait(0.01)
    os.write(write, b"x")
    assert aside.wait()
    assert done == [1, 2]
    aside.end()

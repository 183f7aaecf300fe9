"""Runs that are killed, and what is left of them."""

from __future__ import annotations

import contextlib
import random
import tempfile
import time
from collections.abc import Callable, Iterator
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import torch

from engine.config import RunConfig
from engine.reporting.tracking import read_metrics
from engine.safety import checkpoint, loading
from tests.runs import train_here
from tests.worlds import _context, _rank, free_port

chance = random.SystemRandom()


@contextlib.contextmanager
def running(
    size: int, config: RunConfig, function: Callable[..., Any] = train_here, *arguments: Any
) -> Iterator[list[BaseProcess]]:
    """`function(config, *arguments)` on real ranks beside the test; whatever still runs at the end is killed."""
    port = free_port()
    with tempfile.TemporaryDirectory() as name:
        calls = [(rank, size, port, Path(name), function, (config, *arguments)) for rank in range(size)]
        ranks: list[BaseProcess] = [_context().Process(target=_rank, args=call) for call in calls]
        for process in ranks:
            process.start()
        try:
            yield ranks
        finally:
            for process in ranks:
                process.kill()
                process.join()


def kill_run(size: int, config: RunConfig, due: Callable[[], bool], *, victim: int, mercy: float) -> None:
    """Starts a run and kills the rank `victim` (SIGKILL) as soon as `due()`, and the others `mercy` seconds later."""
    deadline = time.monotonic() + 240
    with running(size, config) as ranks:
        while not due():
            alive = [process.is_alive() for process in ranks]
            assert all(alive), f"the run ended before it could be killed: {alive}"
            assert time.monotonic() < deadline, "the moment to kill did not come within 60 s"
        ranks[victim].kill()
        time.sleep(mercy)
        print(f"killed rank {victim}, the others {mercy:.3f} s later; {state_of(config.folder)}")


def kill_after_step(size: int, config: RunConfig, step: int) -> None:
    """Kills a run when its metrics have come to `step`: a rank and a delay by chance, both printed."""
    victim, mercy = chance.randrange(size), chance.choice([0.0, 0.0, 0.05, 0.3])
    kill_run(size, config, lambda: last_step(config.folder) >= step, victim=victim, mercy=mercy)


def last_step(folder: Path) -> int:
    """The last step in the metrics."""
    return max((line["step"] for line in read_metrics(folder)), default=0)


def state_of(folder: Path) -> str:
    """What a kill left, in words."""
    there = sorted(path.name for path in (folder / "checkpoints").glob("*"))
    return f"metrics up to step {last_step(folder)}, checkpoints: {', '.join(there) or 'none'}"


def final_state(folder: Path) -> dict[str, Any]:
    """Everything in the files of the newest checkpoint: `file/key/key` -> tensor or plain value."""
    where = checkpoint.folder_of(folder, checkpoint.steps_on_disk(folder)[-1])
    flat: dict[str, Any] = {"step": loading.verify(where).step}

    def walk(value: Any, key: str) -> None:
        if isinstance(value, dict | list | tuple):
            for name, inner in value.items() if isinstance(value, dict) else enumerate(value):
                walk(inner, f"{key}/{name}")
        else:
            flat[key] = value

    for name in loading.verify(where).files:
        walk(loading.read_state(where, name), name)
    return flat


def assert_same_state(one: dict[str, Any], other: dict[str, Any], relative: float = 0.0) -> None:
    """Every tensor within `relative` of the other in norm, 0 for equal bits; every other value equal."""
    assert one.keys() == other.keys()
    for key, expected in other.items():
        if not isinstance(expected, torch.Tensor):
            assert one[key] == expected, f"{key}: {one[key]} is not {expected}"
        elif relative == 0:
            assert torch.equal(one[key], expected), f"{key}: not bit-equal"
        else:
            difference = (one[key].double() - expected.double()).norm()
            assert difference <= relative * expected.double().norm(), f"{key}: off by {difference}"


def numbers(folder: Path) -> list[dict[str, Any]]:
    """The lines of the metrics without what a clock measured."""
    return [
        {key: value for key, value in line.items() if not key.startswith("speed/")} for line in read_metrics(folder)
    ]

"""Real gloo worlds for tests: ranks are forked from a server that has imported torch once, so a rank costs less than a
tenth of a second."""

from __future__ import annotations

import contextlib
import functools
import itertools
import multiprocessing
import multiprocessing.connection
import os
import socket
import tempfile
import time
import traceback
from collections.abc import Callable
from multiprocessing.context import ForkServerContext
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from engine.ranks.collectives import Launch, start


@functools.cache
def _context() -> ForkServerContext:
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["tests.preload"])
    return context


_FIRST, _PORTS = 12_000, 2_000
"""Below those that the system gives to whoever asks for any, and others for each worker of the tests."""
_TRIED = itertools.count(os.getpid())


def free_port() -> int:
    """A port that a process started next can listen at."""
    first = _FIRST + _PORTS * int(os.environ.get("PYTEST_XDIST_WORKER", "gw0").removeprefix("gw"))
    for tried in itertools.islice(_TRIED, _PORTS):
        with contextlib.suppress(OSError), socket.socket() as probe:
            probe.bind(("127.0.0.1", first + tried % _PORTS))
            return first + tried % _PORTS
    raise OSError(f"no port of {first} to {first + _PORTS - 1} is free")


def run_world(size: int, function: Callable[..., Any], *arguments: Any, timeout: float = 240) -> list[Any]:
    """Calls `function(*arguments)`, a function at the top of a module, on every rank of a new gloo world.

    Returns:
        What each rank returned (anything torch can save), in the order of ranks.

    Raises:
        RuntimeError: with the traceback of a rank that failed, or naming the ranks that did not end in time.
    """
    return run_ranks(size, _with_process_group, function, *arguments, timeout=timeout)


def run_ranks(size: int, function: Callable[..., Any], *arguments: Any, timeout: float = 240) -> list[Any]:
    """As `run_world`, for functions that start the process group themselves, from what torchrun's environment says."""
    port = free_port()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        ranks = [
            _context().Process(target=_rank, args=(rank, size, port, folder, function, arguments))
            for rank in range(size)
        ]
        for process in ranks:
            process.start()
        try:
            while running := [p for p in ranks if p.exitcode is None]:
                if not multiprocessing.connection.wait([p.sentinel for p in running], timeout):
                    raise RuntimeError(f"ranks {[ranks.index(p) for p in running]} did not end within {timeout} s")
                if any(p.exitcode for p in ranks):
                    failed = [path.read_text() for path in folder.glob("*.failed")]
                    raise RuntimeError("\n".join(failed) or f"exit codes {[p.exitcode for p in ranks]}")
        finally:
            for process in ranks:
                process.kill()
                process.join()
        return [torch.load(folder / f"{rank}.result", weights_only=False) for rank in range(size)]


def _rank(rank: int, size: int, port: int, folder: Path, function: Callable[..., Any], arguments: Any) -> None:
    torch.set_num_threads(1)
    os.environ.update(
        RANK=str(rank),
        LOCAL_RANK=str(rank),
        WORLD_SIZE=str(size),
        LOCAL_WORLD_SIZE=str(size),
        MASTER_ADDR="127.0.0.1",
        MASTER_PORT=str(port),
    )
    try:
        torch.save(function(*arguments), folder / f"{rank}.result")
    except BaseException:
        (folder / f"{rank}.failed").write_text(f"rank {rank}:\n{traceback.format_exc()}")
        raise


def _with_process_group(function: Callable[..., Any], *arguments: Any) -> Any:
    start(Launch.from_environment(), torch.device("cpu"))
    # Whoever has nothing to do and leaves early is missed by those that have not found all others yet.
    dist.barrier()
    rank, world, store = dist.get_rank(), dist.get_world_size(), dist.distributed_c10d._get_default_store()
    try:
        result = function(*arguments)
    finally:
        dist.destroy_process_group()
    leave_last(store, rank, world)
    return result


def leave_last(store: Any, rank: int, world: int) -> None:
    """To be called by all ranks at their end: the store goes with rank 0, and others may still want it."""
    store.add("left", 1)
    while rank == 0 and store.add("left", 0) < world:
        time.sleep(0.002)

"""Runs the parts one after another, each in processes of its own that are killed when its time is over."""

from __future__ import annotations

import contextlib
import importlib
import multiprocessing
import multiprocessing.connection
import os
import signal
import socket
import sys
import time
import traceback
from collections.abc import Sequence
from datetime import datetime
from multiprocessing.process import BaseProcess
from pathlib import Path

import torch
import torch.distributed as dist

import launch
from engine.ranks.collectives import Launch, choose_device, start
from launch.bench.gpu.bench import ROWS, Bench, append
from launch.bench.gpu.parts import PARTS, Part
from launch.bench.gpu.table import WHOLE, write_table

_ROOM = "launch.bench.gpu"
_LEAST = 8.0
"""Seconds below which a part is not begun."""


def run_parts(out: Path, only: Sequence[str] | None, *, quick: bool, seconds: float) -> int:
    """Runs the parts and writes `rows.jsonl` and `gpu.md` into a folder, which may hold rows of an earlier run.

    Args:
        only: the parts to run, all if absent.
        quick: at toy sizes, to try the command.
        seconds: limit of all together.

    Returns:
        The exit code: 1 where a part has failed or had no time.
    """
    out.mkdir(parents=True, exist_ok=True)
    (out / ROWS).touch()
    # The fork server, and what it forks, shall find our packages however this was started.
    root = str(Path(launch.__file__).parents[1])
    os.environ["PYTHONPATH"] = os.pathsep.join([root, *filter(None, [os.environ.get("PYTHONPATH")])])
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([f"{_ROOM}.{part.function.partition('.')[0]}" for part in PARTS.values()])
    end, run, failed = time.monotonic() + seconds, f"{datetime.now():%Y-%m-%d %H:%M:%S}", []
    for name, part in PARTS.items():
        if only and name not in only:
            continue
        # A busy CPU takes its time over toys, too.
        limit = min((4 if quick else 1) * part.seconds, end - time.monotonic())
        begin = time.monotonic()
        trouble = "not run: no time is left" if limit < _LEAST else _run(name, part, out, run, quick, limit)
        took = round(time.monotonic() - begin, 1)
        if trouble:
            failed.append(name)
            append(out, name, run, "", "FAILED", note=trouble, seconds=took)
        else:
            append(out, name, run, "", WHOLE, seconds=took)
        write_table(out, {key: each.title for key, each in PARTS.items()})
    print(f"{out / 'gpu.md'} is written; " + (f"failed: {', '.join(failed)}" if failed else "nothing has failed"))
    return int(bool(failed))


def _run(name: str, part: Part, out: Path, run: str, quick: bool, limit: float) -> str | None:
    """Runs one part. Returns what went wrong."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    deadline = time.monotonic() + limit
    ranks: list[BaseProcess] = [
        multiprocessing.get_context("forkserver").Process(
            target=_rank, args=(name, Launch(rank, rank, part.ranks), port, out, run, quick, deadline)
        )
        for rank in range(part.ranks)
    ]
    try:
        for process in ranks:
            process.start()
        while running := [process for process in ranks if process.exitcode is None]:
            left = deadline - time.monotonic()
            if left <= 0 or not multiprocessing.connection.wait([p.sentinel for p in running], left):
                return f"killed after its {limit:.0f} s"
            broken = [p.exitcode for p in ranks if p.exitcode]
            if broken:
                return f"ended with exit code {broken[0]}; the row before, or the terminal, says why"
    finally:
        for process in ranks:
            # With its children: each rank leads a group of its own.
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.killpg(process.pid or 0, signal.SIGKILL) if process.pid else None
            process.kill()
            process.join()
    return None


def _rank(name: str, place: Launch, port: int, out: Path, run: str, quick: bool, deadline: float) -> None:
    os.setsid()
    part = PARTS[name]
    os.environ.update(part.environment)
    os.environ.update(LOCAL_WORLD_SIZE=str(place.world))
    if place.world > 1:
        os.environ.update(RANK=str(place.rank), LOCAL_RANK=str(place.local_rank), WORLD_SIZE=str(place.world))
        os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    device = choose_device("auto", place)
    if quick:
        torch.set_num_threads(1)
    bench = Bench(name, out, run, quick, place, device, deadline)
    module, _, function = part.function.partition(".")
    try:
        missing = part.environment and _why_not_nccl(device)
        if missing:
            bench.row("not run", note=missing)
            return
        start(place, device)
        getattr(importlib.import_module(f"{_ROOM}.{module}"), function)(bench)
    except BaseException as error:
        traceback.print_exc()
        bench.row("error", note=f"{type(error).__name__}: {' '.join(str(error).split())[:300]}")
        sys.stderr.flush()
        os._exit(1)
    dist.destroy_process_group()


def _why_not_nccl(device: torch.device) -> str | None:
    if device.type != "cuda":
        return "needs CUDA"
    version = torch.cuda.nccl.version()
    if version < (2, 30):
        return f"NCCL {'.'.join(map(str, version))} takes no two ranks on one card; 2.30 and later do"
    return None

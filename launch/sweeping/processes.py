"""Runs of a sweep as processes, several at a time, each with its share of cores and GPUs."""

from __future__ import annotations

import contextlib
import ctypes
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from engine.config.grid import Cell, Grid
from launch.sweeping import cells as on_disk

ROOT = Path(__file__).parents[2]

_PR_SET_PDEATHSIG = 1


@dataclass(frozen=True)
class _Running:
    cell: Cell
    process: subprocess.Popen[bytes]
    slot: int
    begin: int
    """Bytes of the log that are of earlier starts."""
    preempted: Path


class Pool:
    """`jobs` runs at a time, in slots. A process that dies has all its runs save and end."""

    def __init__(self, grid: Grid, jobs: int) -> None:
        self._grid, self._jobs = grid, jobs
        self._running: list[_Running] = []
        self._devices = _visible_devices()

    @property
    def busy(self) -> bool:
        """Whether a run is going on."""
        return bool(self._running)

    @property
    def has_room(self) -> bool:
        """Whether another one may be started."""
        return len(self._running) < self._jobs

    def start(self, cell: Cell) -> None:
        """Starts a run, or has it go on from its checkpoint."""
        folder, ranks = self._grid.folder, self._grid.ranks
        slot = min(set(range(self._jobs)) - {running.slot for running in self._running})
        log = on_disk.log_of(folder, cell)
        preempted = log.with_suffix(".preempted")
        begin = log.stat().st_size if log.exists() else 0
        several = [str(ROOT / "launch" / "ranks.py"), f"--nproc-per-node={ranks}"] if ranks > 1 else []
        command = [
            sys.executable,
            *several,
            str(ROOT / "launch" / "train.py"),
            str(on_disk.config_of(folder, cell)),
            "--preempted",
            str(preempted),
        ]
        with log.open("ab") as output:
            process = subprocess.Popen(
                command,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=output,
                env={**os.environ, **share(slot, self._jobs, ranks, len(os.sched_getaffinity(0)), self._devices)}
                | {"WANDB_RUN_GROUP": self._grid.name},
                start_new_session=True,  # Ctrl-C is for the sweep, which passes it on once.
                preexec_fn=_end_with_parent,
            )
        self._running.append(_Running(cell, process, slot, begin, preempted))

    def ended(self, seconds: float) -> Iterator[tuple[Cell, str]]:
        """The runs that have ended, after waiting for one at most so long, and why they have failed; empty if not."""
        deadline = time.monotonic() + seconds
        while time.monotonic() < deadline and all(running.process.poll() is None for running in self._running):
            time.sleep(0.05)
        for running in [running for running in self._running if running.process.poll() is not None]:
            self._running.remove(running)
            code = running.process.returncode
            preempted = running.preempted.exists()
            running.preempted.unlink(missing_ok=True)
            failed = code not in (0, -signal.SIGTERM, -signal.SIGKILL, 130) and not preempted
            log = on_disk.log_of(self._grid.folder, running.cell)
            yield running.cell, on_disk.last_line_of_error(log, running.begin) if failed else ""

    def stop(self) -> None:
        """Asks all runs to save and end."""
        for running in self._running:
            with contextlib.suppress(ProcessLookupError):
                running.process.terminate()

    def close(self) -> None:
        """Waits for what is going on after an error; nothing after a whole sweep."""
        self.stop()
        for running in self._running:
            running.process.wait()


def share(slot: int, jobs: int, ranks: int, cores: int, devices: Sequence[str]) -> dict[str, str]:
    """The environment in which the runs of a slot leave the others theirs.

    Args:
        slot: from 0 to `jobs` - 1.
        ranks: processes of a run.
        cores: of this machine that this process may use.
        devices: the GPUs that it may use, as CUDA_VISIBLE_DEVICES names them.
    """
    threads = {"OMP_NUM_THREADS": str(max(1, cores // (jobs * ranks)))}
    if not devices:
        return threads
    own = [devices[(slot * ranks + rank) % len(devices)] for rank in range(min(ranks, len(devices)))]
    return {**threads, "CUDA_VISIBLE_DEVICES": ",".join(own)}


def _visible_devices() -> list[str]:
    named = os.environ.get("CUDA_VISIBLE_DEVICES")
    if named is not None:
        return [name for name in named.split(",") if name]
    return [str(index) for index in range(torch.cuda.device_count())]


def _end_with_parent() -> None:
    """In the new process: a sweep that is killed has its runs save and end."""
    with contextlib.suppress(AttributeError):  # only Linux can
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGTERM, 0, 0, 0)

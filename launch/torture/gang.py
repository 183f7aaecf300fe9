"""A run under torchrun, seen from outside: its processes, what they have said, how far they have come."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

from engine.config.loading import load
from engine.reporting.tracking import read_metrics
from launch.with_parent import end_with_parent

ROOT = Path(__file__).parents[2]

PATIENCE = 300.0
"""Seconds after which what has not happened is taken for something that never will."""


class UnexpectedError(RuntimeError):
    """A run did what it must not do, or did not do what it must."""


class Gang:
    """`torchrun --standalone launch/train.py CONFIG`, in a session of its own; it does not outlive this process.

    Args:
        config: the run's YAML file, which names its folder; no other gang may have the same.
        restarts: how often torchrun starts all ranks again if one fails.
        output: a new file, for what all of them print.
    """

    def __init__(self, config: Path, ranks: int, restarts: int, output: Path) -> None:
        self.config, self.ranks, self.run = config.absolute(), ranks, load(config).folder
        self._output = output
        with output.open("xb") as file:
            self.agent = subprocess.Popen(
                [
                    *(sys.executable, "-m", "torch.distributed.run", "--standalone"),
                    *(f"--nproc-per-node={ranks}", f"--max-restarts={restarts}"),
                    *("launch/train.py", str(self.config)),
                ],
                cwd=ROOT,
                stdin=subprocess.DEVNULL,
                stdout=file,
                stderr=subprocess.STDOUT,
                start_new_session=True,
                preexec_fn=end_with_parent,
                env={**os.environ, "OMP_NUM_THREADS": "1"},
            )

    def workers(self) -> dict[int, int]:
        """Process ids by rank, of those that have not ended, whether torchrun still lives or not."""
        found = {}
        for folder in Path("/proc").glob("[0-9]*"):
            with contextlib.suppress(OSError, ValueError):  # ended meanwhile, or somebody else's
                command = (folder / "cmdline").read_bytes().split(b"\0")
                if b"launch/train.py" in command and str(self.config).encode() in command:
                    entries = (folder / "environ").read_bytes().split(b"\0")
                    environment = dict(entry.split(b"=", 1) for entry in entries if b"=" in entry)
                    if b"RANK" in environment:
                        found[int(environment[b"RANK"])] = int(folder.name)
        return found

    def kill(self) -> None:
        """SIGKILL to the ranks, rank 0 first, and to torchrun; returns when all are gone."""
        workers = self.workers()
        for rank in sorted(workers):
            with contextlib.suppress(ProcessLookupError):
                os.kill(workers[rank], signal.SIGKILL)
        self.agent.kill()
        self.agent.wait()
        self.wait_until(lambda: not self.workers(), "the end of processes that were killed", alive=False)

    def said(self, since: int = 0) -> str:
        """What the gang has printed, from a number of bytes on."""
        return self._output.read_bytes()[since:].decode(errors="replace")

    def spoken(self) -> int:
        """How many bytes the gang has printed."""
        return self._output.stat().st_size

    def step(self) -> int:
        """The last step in the run's metrics."""
        return max((line["step"] for line in read_metrics(self.run)), default=0)

    def wait_until(self, due: Callable[[], object], what: str, *, alive: bool = True) -> None:
        """Returns as soon as something is due.

        Args:
            alive: torchrun must not end before.

        Raises:
            UnexpectedError: it did, or what is waited for does not come.
        """
        deadline = time.monotonic() + PATIENCE
        while not due():
            if alive and self.agent.poll() is not None and not due():
                raise UnexpectedError(f"torchrun ended with {self.agent.returncode} before {what}; see {self._output}")
            if time.monotonic() > deadline:
                raise UnexpectedError(f"{what} did not come within {PATIENCE:.0f} s; see {self._output}")
            time.sleep(0.002)

    def end(self) -> int:
        """Waits until torchrun has ended. Returns: its exit code."""
        self.wait_until(lambda: self.agent.poll() is not None, "the end of torchrun", alive=False)
        return self.agent.wait()

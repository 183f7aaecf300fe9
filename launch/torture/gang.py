"""A run under torchrun, seen from outside: its processes, what they have said, how far they have come."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

from engine.config.loading import load
from launch.with_parent import end_with_parent

ROOT = Path(__file__).parents[2]

MARK = "COHORT_TORTURE"
"""In the environment of the processes of a gang, to tell them from those of another one of the same run."""

_LINE = 1 << 16
"""Bytes that a line of metrics does not have."""

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
        skew: a value of the config, such as optimizer.lr=0.1, that the last rank alone is given.
    """

    def __init__(self, config: Path, ranks: int, restarts: int, output: Path, skew: str = "") -> None:
        self.config, self.ranks, self.run = config.absolute(), ranks, load(config).folder
        self.output = output
        train = (str(ROOT / "launch/train.py"), str(self.config))
        unlike = f'exec "$@" $([ $RANK = {ranks - 1} ] && echo "{skew}")'
        command = ("--no-python", "bash", "-c", unlike, "bash", sys.executable, *train) if skew else train
        with output.open("xb") as file:
            self.agent = subprocess.Popen(
                [
                    *(sys.executable, "-m", "torch.distributed.run", "--standalone"),
                    *(f"--nproc-per-node={ranks}", f"--max-restarts={restarts}"),
                    *command,
                ],
                cwd=ROOT,
                stdin=subprocess.DEVNULL,
                stdout=file,
                stderr=subprocess.STDOUT,
                start_new_session=True,
                preexec_fn=end_with_parent,
                env={**os.environ, "OMP_NUM_THREADS": "1", MARK: str(output)},
            )

    def workers(self) -> dict[int, int]:
        """Process ids by rank, of those that have not ended, whether torchrun still lives or not."""
        found = {}
        for folder in Path("/proc").glob("[0-9]*"):
            with contextlib.suppress(OSError, ValueError):  # ended meanwhile, or somebody else's
                command = (folder / "cmdline").read_bytes()
                if b"launch/train.py\0" in command and str(self.config).encode() in command.split(b"\0"):
                    entries = (folder / "environ").read_bytes().split(b"\0")
                    environment = dict(entry.split(b"=", 1) for entry in entries if b"=" in entry)
                    if b"RANK" in environment and environment.get(MARK.encode()) == str(self.output).encode():
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
        return self.output.read_bytes()[since:].decode(errors="replace")

    def spoken(self) -> int:
        """How many bytes the gang has printed."""
        return self.output.stat().st_size

    def step(self) -> int:
        """The last step in the run's metrics."""
        with contextlib.suppress(FileNotFoundError), (self.run / "metrics.jsonl").open("rb") as file:
            file.seek(max(0, file.seek(0, os.SEEK_END) - _LINE))
            for line in reversed(file.read().split(b"\n")):
                with contextlib.suppress(ValueError, TypeError, KeyError):
                    return int(json.loads(line)["step"])
        return 0

    def wait_until(
        self, due: Callable[[], object], what: str, *, alive: bool = True, patience: float = PATIENCE
    ) -> None:
        """Returns as soon as something is due.

        Args:
            alive: torchrun must not end before.
            patience: seconds, at most.

        Raises:
            UnexpectedError: it did, or what is waited for does not come.
        """
        deadline = time.monotonic() + patience
        while not due():
            if alive and self.agent.poll() is not None and not due():
                raise UnexpectedError(f"torchrun ended with {self.agent.returncode} before {what}; see {self.output}")
            if time.monotonic() > deadline:
                raise UnexpectedError(f"{what} did not come within {patience:.0f} s; see {self.output}")
            time.sleep(0.002)

    def end(self, patience: float = PATIENCE) -> int:
        """Waits until torchrun has ended. Returns: its exit code."""
        self.wait_until(lambda: self.agent.poll() is not None, "the end of torchrun", alive=False, patience=patience)
        return self.agent.wait()


def refusal(config: Path, *arguments: str) -> str:
    """Starts a run that must be refused, as a process alone. Returns: what it printed.

    Raises:
        UnexpectedError: it was not.
    """
    command = [sys.executable, "launch/train.py", str(config), *arguments]
    with subprocess.Popen(
        command,
        cwd=ROOT,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        preexec_fn=end_with_parent,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    ) as process:
        try:
            said, _ = process.communicate(timeout=3 * PATIENCE)
        except subprocess.TimeoutExpired:
            process.kill()
            said = f"nothing within {3 * PATIENCE:.0f} s"
    if process.returncode != 2:
        raise UnexpectedError(f"a start that must be refused ended with {process.returncode}: {said[-2000:]}")
    return said

"""What `launch/torture` does to a run."""

from __future__ import annotations

import os
import random
import resource
import signal
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from engine.safety import checkpoint, loading
from launch.torture.gang import Gang, UnexpectedError

FULL = 30_000
"""Bytes beyond which no file grows on a full disk: less than a checkpoint's, more than what one gang says."""


@dataclass
class Blow:
    """A disturbance as it happened."""

    target: str
    step: int
    moment: float
    """By the monotonic clock."""
    found: str = ""
    """What came of it, in words."""


@dataclass(frozen=True)
class Kind:
    """A way to disturb a run."""

    name: str
    strike: Callable[[Gang, random.Random], Blow]
    """Returns when all processes are gone, or, if it `heals`, at once.

    Raises: UnexpectedError, where they did not take it as they must."""
    heals: bool = False
    """Whether torchrun starts all ranks again by itself."""
    company: bool = False
    """Whether it needs two ranks."""
    spoils: Callable[[Path, random.Random], tuple[str, str]] | None = None
    """What is then done to the run's files. Returns: what, and what the next start must say of it."""


def _blow(gang: Gang, target: str) -> Blow:
    return Blow(target, gang.step(), time.monotonic())


def _worker(gang: Gang, rng: random.Random) -> tuple[int, int]:
    """A rank and its process id."""
    workers = gang.workers()
    if sorted(workers) != list(range(gang.ranks)):
        raise UnexpectedError(f"the ranks {sorted(workers)} are there, expected {gang.ranks} of them")
    return rng.choice(sorted(workers.items()))


def _gone(gang: Gang, what: str) -> None:
    gang.wait_until(lambda: not gang.workers(), what, alive=False)


def _kill_a_rank(gang: Gang, rng: random.Random) -> Blow:
    rank, process = _worker(gang, rng)
    blow = _blow(gang, f"rank {rank}")
    os.kill(process, signal.SIGKILL)
    return blow


def _kill_a_rank_for_good(gang: Gang, rng: random.Random) -> Blow:
    blow = _kill_a_rank(gang, rng)
    blow.found = f"torchrun ended with {gang.end()}"
    if gang.agent.returncode == 0:
        raise UnexpectedError(f"torchrun ended with 0 after {blow.target} was killed")
    _gone(gang, "the end of the other ranks")
    return blow


def _terminate_torchrun(gang: Gang, rng: random.Random) -> Blow:
    blow = _blow(gang, "torchrun")
    gang.agent.terminate()
    return _saved(gang, blow, signal.SIGTERM, code=1)  # torchrun's, however well its workers ended


def _signal_a_rank(gang: Gang, rng: random.Random) -> Blow:
    rank, process = _worker(gang, rng)
    blow = _blow(gang, f"rank {rank}")
    os.kill(process, signal.SIGUSR1)
    return _saved(gang, blow, signal.SIGUSR1, code=0)


def _saved(gang: Gang, blow: Blow, number: signal.Signals, code: int) -> Blow:
    if gang.end() != code:
        raise UnexpectedError(f"torchrun ended with {gang.agent.returncode} after {number.name}, expected {code}")
    _gone(gang, "the end of all ranks")
    step, (newest, _) = gang.step(), loading.newest(gang.run)
    if f"signal {number.name} at step {step}: saved" not in gang.said() or newest is None or newest.step != step:
        raise UnexpectedError(f"step {step} is not saved, or not said to be, after {number.name}")
    blow.found = f"saved step {step}"
    return blow


def _stop_a_rank(gang: Gang, rng: random.Random) -> Blow:
    rank, process = _worker(gang, rng)
    others = set(gang.workers().values()) - {process}
    blow = _blow(gang, f"rank {rank}")
    os.kill(process, signal.SIGSTOP)
    gang.wait_until(lambda: not others & set(gang.workers().values()), "the end of the other ranks", alive=False)
    said = gang.said()
    if "RankLostError: rank" not in said or f"Rank {rank} does not answer; it was last heard of at step" not in said:
        raise UnexpectedError(f"nobody has named rank {rank}, which was stopped")
    blow.found = f"named after {time.monotonic() - blow.moment:.1f} s"
    gang.kill()
    return blow


def _kill_all(gang: Gang, rng: random.Random) -> Blow:
    blow = _blow(gang, "all")
    gang.kill()
    return blow


def _kill_in_a_write(gang: Gang, rng: random.Random) -> Blow:
    workers = gang.workers()
    where = gang.run / "checkpoints"
    gang.wait_until(lambda: any(name.endswith(".tmp") for name in os.listdir(where)), "the next checkpoint")
    for _, process in sorted(workers.items()):  # before anything else: a write takes some milliseconds
        os.kill(process, signal.SIGKILL)
    blow = _blow(gang, "all")
    gang.kill()
    left = [path.name for path in checkpoint.leftovers(gang.run)]
    blow.found = f"left {', '.join(left)}" if left else "too late by a moment: it was written"
    return blow


def _kill_torchrun(gang: Gang, rng: random.Random) -> Blow:
    blow = _blow(gang, "torchrun")
    gang.agent.kill()
    gang.agent.wait()
    _gone(gang, "the end of ranks whose torchrun was killed")
    blow.found = f"no rank left after {time.monotonic() - blow.moment:.1f} s"
    if gang.step() > blow.step + 5:  # A step or two may have been under way.
        raise UnexpectedError(f"ranks whose torchrun was killed at step {blow.step} trained on to step {gang.step()}")
    return blow


def _fill_the_disk(gang: Gang, rng: random.Random) -> Blow:
    step = gang.step()
    for process in gang.workers().values():
        resource.prlimit(process, resource.RLIMIT_FSIZE, (FULL, FULL))
    gang.wait_until(
        lambda: gang.said().count("not written: ") >= 2, f"the word that two checkpoints after step {step} fail"
    )
    blow = _blow(gang, "all")
    blow.found = f"full since step {step}, trained on"
    gang.kill()
    return blow


def _damage(run: Path, rng: random.Random) -> tuple[str, str]:
    folder = checkpoint.folder_of(run, checkpoint.steps_on_disk(run)[-1])
    file = rng.choice(sorted(folder.iterdir()))
    content = bytearray(file.read_bytes())
    if rng.random() < 0.5:
        os.truncate(file, rng.randrange(len(content)))
        what = "cut short"
    else:
        content[rng.randrange(len(content))] ^= 1 << rng.randrange(8)
        file.write_bytes(content)
        what = "a bit turned in"
    return f"{what} {folder.name}/{file.name}", f"not used: {folder}"


def _half_a_line(run: Path, rng: random.Random) -> tuple[str, str]:
    lines = (run / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    with (run / "metrics.jsonl").open("a", encoding="utf-8") as file:
        file.write(lines[-1][: rng.randrange(1, len(lines[-1]))])
    return "half a line written", ""


KINDS = (
    Kind("kill a rank", _kill_a_rank, heals=True),
    Kind("kill a rank for good", _kill_a_rank_for_good),
    Kind("SIGTERM to torchrun", _terminate_torchrun),
    Kind("SIGUSR1 to a rank", _signal_a_rank),
    Kind("stop a rank", _stop_a_rank, company=True),
    Kind("kill in a write", _kill_in_a_write),
    Kind("kill torchrun", _kill_torchrun),
    Kind("full disk", _fill_the_disk),
    Kind("damage", _kill_all, spoils=_damage),
    Kind("half a line", _kill_all, spoils=_half_a_line),
)

"""What `launch/torture` does to a run."""

from __future__ import annotations

import contextlib
import gzip
import json
import os
import random
import re
import resource
import signal
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from typing import TypeVar

from engine.config.loading import load
from engine.files import write_bytes, write_json
from engine.safety import checkpoint, loading
from launch.torture.gang import PATIENCE, Gang, UnexpectedError, refusal

_T = TypeVar("_T")

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
    passes: bool = False
    """Whether the run trains on as if nothing had been."""
    company: bool = False
    """Whether it needs two ranks."""
    spoils: Callable[[Gang, random.Random], tuple[str, str]] | None = None
    """What is done next, where all are gone. Returns: what, and what the next start must say of it."""
    returns: Callable[[Gang, Gang], str] | None = None
    """What becomes of the gang that was struck when the next one, its successor, trains. Returns: that, in words."""


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


def _saved(gang: Gang, blow: Blow, number: signal.Signals | None, code: int) -> Blow:
    """After one signal, or, with None, some: the step is saved, and all have ended."""
    name = number.name if number else "signals"
    if gang.end() != code:
        raise UnexpectedError(f"torchrun ended with {gang.agent.returncode} after {name}, expected {code}")
    _gone(gang, "the end of all ranks")
    step, (newest, _) = gang.step(), loading.newest(gang.run)
    said = re.search(rf"signal {number.name if number else '[A-Z0-9]+'} at step {step}: saved", gang.said())
    if not said or newest is None or newest.step != step:
        raise UnexpectedError(f"step {step} is not saved, or not said to be, after {name}")
    blow.found = f"saved step {step}"
    return blow


def _storm(gang: Gang, rng: random.Random) -> Blow:
    _worker(gang, rng)
    workers = gang.workers().values()
    blow = _blow(gang, "all")
    while gang.agent.poll() is None:
        for process in workers:
            for number in (signal.SIGUSR1, signal.SIGTERM, signal.SIGHUP):
                with contextlib.suppress(ProcessLookupError):
                    os.kill(process, number)
        if time.monotonic() - blow.moment > PATIENCE:
            raise UnexpectedError(f"no end within {PATIENCE:.0f} s of signals")
        time.sleep(0.01)
    return _saved(gang, blow, None, code=0)


def _stop_a_rank(gang: Gang, rng: random.Random) -> Blow:
    rank, process = _worker(gang, rng)
    others = set(gang.workers().values()) - {process}
    blow = _blow(gang, f"rank {rank}")
    os.kill(process, signal.SIGSTOP)
    gang.wait_until(lambda: not others & set(gang.workers().values()), "the end of the other ranks", alive=False)
    said = gang.said()
    if "RankLostError: rank" not in said or f"Rank {rank} does not answer; it was last heard of at " not in said:
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


def _limit(gang: Gang, size: int) -> None:
    for process in gang.workers().values():
        _, most = resource.prlimit(process, resource.RLIMIT_FSIZE)
        resource.prlimit(process, resource.RLIMIT_FSIZE, (size, most))


def _fill_the_disk(gang: Gang, rng: random.Random) -> Blow:
    step = gang.step()
    _limit(gang, FULL)
    gang.wait_until(
        lambda: gang.said().count("not written: ") >= 2, f"the word that two checkpoints after step {step} fail"
    )
    blow = _blow(gang, "all")
    blow.found = f"full since step {step}, trained on"
    gang.kill()
    return blow


def _fill_the_disk_at_the_end(gang: Gang, rng: random.Random) -> Blow:
    rank, process = _worker(gang, rng)
    _limit(gang, FULL)
    blow = _blow(gang, f"rank {rank}")
    os.kill(process, signal.SIGTERM)
    # A checkpoint of before the signal may fail as well: the last one says that nothing is trained after it.
    gang.wait_until(lambda: "nothing is trained after it" in gang.said(), "the word that the last save has failed")
    if rng.random() < 0.5:
        _limit(gang, resource.RLIM_INFINITY)
        blow = _saved(gang, blow, signal.SIGTERM, code=0)
        blow.found += " when there was room"
        return blow
    if gang.end() != 1 or "NOT saved" not in gang.said() or "exitcode  : 3" not in gang.said():
        raise UnexpectedError(f"a last step that was not saved ended with {gang.agent.returncode}, expected 1 and 3")
    _gone(gang, "the end of all ranks")
    blow.found = "not saved, and said so"
    return blow


def _beside(gang: Gang, act: Callable[[], _T]) -> _T:
    """What something gives that takes long. The gang trains on in small steps: its run would be over by then."""
    workers = gang.workers().values()
    with ThreadPoolExecutor(1) as thread:
        acting = thread.submit(act)
        while not acting.done():
            for number, seconds in ((signal.SIGSTOP, 2.0), (signal.SIGCONT, 0.05)):
                for process in workers:
                    with contextlib.suppress(ProcessLookupError):
                        os.kill(process, number)
                time.sleep(seconds)
    return acting.result()


def _start_a_second(gang: Gang, rng: random.Random) -> Blow:
    arguments = rng.choice([(), ("--fresh",)])
    blow = _blow(gang, "folder")
    said = _beside(gang, partial(refusal, gang.config, *arguments))
    if "is in use by process" not in said:
        raise UnexpectedError(f"a second start was refused for another reason: {said[-2000:]}")
    blow.found = f"refused {' '.join(arguments)}"
    return blow


def _cut_off(gang: Gang, rng: random.Random) -> Blow:
    """All are stopped, and the owner's file tells of another machine, on which nobody can see whether they live."""
    owner = max((gang.run / "owner").glob("[0-9]*"), key=lambda path: int(path.name))
    write_json(owner, {**json.loads(owner.read_text()), "boot": "another machine", "host": "elsewhere"})
    workers = gang.workers()
    blow = _blow(gang, "all")
    for process in (gang.agent.pid, *workers.values()):
        os.kill(process, signal.SIGSTOP)
    return blow


def _come_back(gang: Gang, successor: Gang) -> str:
    begin = time.monotonic()
    for process in (*gang.workers().values(), gang.agent.pid):
        os.kill(process, signal.SIGCONT)
    if _beside(successor, gang.end) == 0:
        raise UnexpectedError("a run whose folder was taken over ended with 0")
    _gone(gang, "the end of ranks whose folder was taken over")
    said = gang.said()
    why = next((why for why in ("has taken this folder over", "RankLostError") if why in said), None)
    if why is None:
        raise UnexpectedError("a run whose folder was taken over did not say so")
    return f"came back, ended within {time.monotonic() - begin:.1f} s: {why}"


def _change_the_data(gang: Gang, rng: random.Random) -> tuple[str, str]:
    path = load(gang.config).data.folder / "train-labels-idx1-ubyte.gz"
    whole = path.read_bytes()
    labels = bytearray(gzip.decompress(whole))
    place = rng.randrange(8, len(labels))
    labels[place] = (labels[place] + 1) % 10
    write_bytes(path, gzip.compress(bytes(labels)))
    try:
        said = refusal(gang.config)
    finally:
        write_bytes(path, whole)
    if "data: train labels: " not in said:
        raise UnexpectedError(f"a run with another label was refused for another reason: {said[-2000:]}")
    return "another label refused", ""


def _skew_the_ranks(gang: Gang, rng: random.Random) -> tuple[str, str]:
    skew = rng.choice(["optimizer.lr=0.04", "evaluation.every_epochs=3", "train.clip_norm=1", "seed=5"])
    skewed = Gang(gang.config, max(2, gang.ranks), 0, gang.output.with_suffix(".skewed.log"), skew)
    try:
        code, said = skewed.end(), skewed.said()
    finally:
        skewed.kill()
    if code == 0 or f"{skew.partition('=')[0]}" not in said.partition("error: ")[2]:
        raise UnexpectedError(f"ranks that differ in {skew} ended with {code}; see {skewed.output}")
    return f"{skew} on one rank refused", ""


def _damage(gang: Gang, rng: random.Random) -> tuple[str, str]:
    run = gang.run
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


def _half_a_line(gang: Gang, rng: random.Random) -> tuple[str, str]:
    path = gang.run / "metrics.jsonl"
    lines = path.read_text(encoding="utf-8").splitlines()
    with path.open("a", encoding="utf-8") as file:
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
    Kind("signal storm", _storm),
    Kind("full disk at the end", _fill_the_disk_at_the_end),
    Kind("second start", _start_a_second, passes=True),
    Kind("cut off", _cut_off, returns=_come_back),
    Kind("other data", _kill_all, spoils=_change_the_data),
    Kind("skewed ranks", _kill_all, spoils=_skew_the_ranks),
)

"""Which rank does not answer: every rank says every second where it is, in the store that the world met in."""

from __future__ import annotations

import contextlib
import os
import re
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterable, Iterator, Mapping
from datetime import timedelta
from functools import partial
from pathlib import Path

import torch.distributed as dist

from engine.ranks.collectives import Launch
from engine.ranks.place import Place

PERIOD = 1.0
"""Seconds between two beats."""

ENDED = "ended"

_COLLECTIVE = re.compile(r"gloo|nccl|connection (closed|reset|refused)|timed out|broken pipe", re.IGNORECASE)


class RankLostError(RuntimeError):
    """A collective failed. The message names the ranks that did not take part, as far as can be known."""


class Whereabouts:
    """Says where this rank is; whoever knows sets `ask`."""

    def __init__(self) -> None:
        self.ask = self.starting
        self.limited = False
        """Whether its collectives fail by themselves after a while."""
        self.guard: Callable[[], contextlib.AbstractContextManager[None]] = contextlib.nullcontext
        """For a body whose errors shall be explained before what comes after it, as `heartbeat` explains them."""

    def starting(self) -> Place:
        """Before its first step, or building all anew."""
        return Place(0, 0.0, "its start")

    def __call__(self) -> Place:
        return self.ask()


@contextlib.contextmanager
def heartbeat(launch: Launch, word: str, where: Whereabouts, timeout: float) -> Iterator[None]:
    """Beats until its body is over, and tells of ranks that are silent, or that the others wait for.

    A thread beats, so a rank whose program hangs is heard of all the same; how long it has been where it is tells.
    NCCL's watchdog ends the process of a rank that has waited too long, so what there is to say is said before.

    Before the first step is over, collectives wait for as long as compiling may take. A rank that is silent for
    `timeout` seconds does not compile: where one is, this process ends.

    Args:
        word: what `start` returned.
        where: says where this rank is.
        timeout: seconds; after half of them the first two ranks warn of a rank that is silent or does not move.

    Raises:
        RankLostError: in place of the error of a collective that failed in the body.
    """
    if launch.world == 1:
        yield
        return
    pulse = _Pulse(launch, word, where)
    over = threading.Event()
    thread = threading.Thread(target=_beat, args=(pulse, over, timeout), daemon=True)
    thread.start()
    where.guard = partial(_explained, pulse, over)
    try:
        with where.guard():
            yield
    finally:
        over.set()
        thread.join(2 * PERIOD)
        _within(2 * PERIOD, partial(pulse.say, pulse.last_words))


@contextlib.contextmanager
def _explained(pulse: _Pulse, over: threading.Event) -> Iterator[None]:
    """Tells the others of an error of the body, or this rank what they are doing where that explains it."""
    try:
        yield
    except BaseException as error:
        if over.is_set():  # in a body within this one
            raise
        over.set()
        reason = str(error).strip().partition("\n")[0]
        if isinstance(error, dist.DistError) or (type(error) is RuntimeError and _COLLECTIVE.search(str(error))):
            # The traceback of one that waited tells nobody anything: another rank is at fault.
            here = f"rank {pulse.rank} of {pulse.world}, {pulse.where()}: {_line_of_ours(error)}"
            seen = _within(6 * PERIOD, pulse.look_around) or f"Nor does {pulse.holder} answer."
            raise RankLostError(f"{here}: {reason}\n{seen}") from None
        pulse.last_words = f"failed, {pulse.where()}: {type(error).__name__}: {reason}"
        _within(2 * PERIOD, partial(pulse.say, pulse.last_words))
        raise


def _within(seconds: float, action: Callable[[], str | None]) -> str | None:
    """The result of an action, or None if it takes longer: torch waits for a store that has stopped without a limit."""
    results: list[str | None] = [None]

    def act() -> None:
        with contextlib.suppress(RuntimeError):
            results[0] = action()

    thread = threading.Thread(target=act, daemon=True)
    thread.start()
    thread.join(seconds)
    return results[0]


def _line_of_ours(error: BaseException) -> str:
    """The innermost line of this project that an error came through."""
    frames = traceback.extract_tb(error.__traceback__)
    rooms = str(Path(__file__).parents[2])
    return next((frame.line or frame.name for frame in reversed(frames) if frame.filename.startswith(rooms)), "torch")


class _Pulse:
    """This rank's own connection to the store: a store that does not answer must hold up nobody else."""

    def __init__(self, launch: Launch, word: str, where: Whereabouts) -> None:
        self.rank, self.world, self.where, self._count = launch.rank, launch.world, where, 0
        self.last_words = ENDED
        self._place, self._since = where(), time.monotonic()
        self.holder = (
            f"the store at {os.environ['MASTER_ADDR']}:{os.environ['MASTER_PORT']}, rank 0's or torchrun's there,"
        )
        store = dist.TCPStore(  # type: ignore[attr-defined]
            os.environ["MASTER_ADDR"],
            int(os.environ["MASTER_PORT"]),
            is_master=False,
            wait_for_workers=False,
            timeout=timedelta(seconds=10),
        )
        self._store = dist.PrefixStore(word, store)  # type: ignore[attr-defined]
        self.beat()

    def beat(self) -> None:
        place = self.where()
        if place != self._place:
            self._place, self._since = place, time.monotonic()
        self._count += 1
        self.say(f"{self._count} {place.step} {place.parts} {place}, for {self.stays:.0f} s")

    @property
    def limited(self) -> bool:
        """As in `Whereabouts`."""
        return self.where.limited

    @property
    def stays(self) -> float:
        """Seconds for which this rank has been where it is."""
        return time.monotonic() - self._since

    def say(self, words: str) -> None:
        self._store.set(f"heartbeat/{self.rank}", words)

    def hear(self, ranks: Iterable[int]) -> dict[int, str]:
        """What other ranks said last. Raises: RuntimeError, where the store does not answer."""
        keys = {rank: f"heartbeat/{rank}" for rank in ranks if rank != self.rank}
        return {rank: self._store.get(key).decode() for rank, key in keys.items() if self._store.check([key])}

    def look_around(self) -> str:
        """What the other ranks do, in sentences. Takes three beats. Raises: RuntimeError, as `hear`."""
        before = self.hear(range(self.world))
        for _ in range(3):
            time.sleep(PERIOD)
            self.beat()
        now = self.hear(range(self.world))
        lost = [_sentence(rank, words) for rank, words in now.items() if words == before.get(rank) and words != ENDED]
        if lost:
            return "\n".join(lost)
        others = "; ".join(f"rank {rank}: {_place(words) or words}" for rank, words in now.items())
        places = {rank: place for rank, words in now.items() if (place := _place(words))}
        return f"{_behind({**places, self.rank: self._place})}: {others}."


def _sentence(rank: int, words: str) -> str:
    place = _place(words)
    if place is None:
        return f"Rank {rank} {words}."
    return f"Rank {rank} does not answer; it was last heard of at {place.text.rpartition(', for ')[0]}."


def _place(words: str) -> Place | None:
    """Where a rank is that beats, by what it says; None for last words."""
    count, *rest = words.split(" ", 3)
    return Place(int(rest[0]), float(rest[1]), rest[2]) if count.isdigit() and len(rest) == 3 else None


def _behind(places: Mapping[int, Place]) -> str:
    """Which ranks are where the others have been before."""
    late = [rank for rank, place in places.items() if any(place.is_before(other) for other in places.values())]
    least = [rank for rank in late if not any(places[other].is_before(places[rank]) for other in late)]
    if not least:
        return "No other rank is lost"
    names = ", ".join(str(rank) for rank in least)
    return f"{'Ranks' if len(least) > 1 else 'Rank'} {names} {'are' if len(least) > 1 else 'is'} behind the others"


def _beat(pulse: _Pulse, over: threading.Event, timeout: float) -> None:
    warn_after = timeout / 2
    heard: dict[int, tuple[str, float]] = {}
    warned: set[int] = set()
    waits = False
    looked = time.monotonic()
    while not over.wait(PERIOD):
        try:
            pulse.beat()
            # Rank 0 looks after the others and rank 1 after rank 0: reading is not for thousands.
            if pulse.rank > 1 or time.monotonic() - looked < warn_after / 4:
                continue
            looked = time.monotonic()
            if pulse.stays >= warn_after:
                if not waits:
                    print(f"warning: rank {pulse.rank} waits: {pulse.look_around()}", file=sys.stderr, flush=True)
                waits = True
            else:
                waits = False
            for rank, words in pulse.hear(range(1 if pulse.rank else pulse.world)).items():
                if rank not in heard or heard[rank][0] != words:
                    heard[rank] = words, looked
                elif looked - heard[rank][1] >= warn_after and rank not in warned and words != ENDED:
                    warned.add(rank)
                    print(f"warning: {warn_after:g} s: {_sentence(rank, words)}", file=sys.stderr, flush=True)
                elif looked - heard[rank][1] >= timeout and not pulse.limited and _place(words) is not None:
                    print(f"error: {timeout:g} s: {_sentence(rank, words)}", file=sys.stderr, flush=True)
                    os._exit(1)
        except RuntimeError:
            # The collective that fails next says more; but without a limit it may not fail.
            if not over.wait(warn_after) and not pulse.limited:
                print(f"error: rank {pulse.rank}: {pulse.holder} is gone", file=sys.stderr, flush=True)
                os._exit(1)
            return

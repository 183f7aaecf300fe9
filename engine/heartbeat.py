"""Which rank does not answer: every rank says every second where it is, in the store that the world met in."""

from __future__ import annotations

import contextlib
import os
import re
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from datetime import timedelta

import torch.distributed as dist

from engine.collectives import Launch

PERIOD = 1.0
"""Seconds between two beats."""

_COLLECTIVE = re.compile(r"gloo|nccl|connection (closed|reset|refused)|timed out|broken pipe", re.IGNORECASE)


class RankLostError(RuntimeError):
    """A collective failed. The message names the ranks that did not take part, as far as can be known."""


@contextlib.contextmanager
def heartbeat(launch: Launch, where: Callable[[], str], warn_after: float) -> Iterator[None]:
    """Beats until its body is over, and tells of ranks that are silent.

    Args:
        where: says where this rank is, such as "step 17".
        warn_after: seconds of silence after which the first two ranks warn of a rank.

    Raises:
        RankLostError: from the error of a collective that failed in the body.
    """
    if launch.world == 1:
        yield
        return
    pulse = _Pulse(launch, where)
    over = threading.Event()
    thread = threading.Thread(target=_beat, args=(pulse, over, warn_after), daemon=True)
    thread.start()
    last_words = None
    try:
        yield
    except RuntimeError as error:
        reason = str(error).strip().partition("\n")[0]
        if isinstance(error, dist.DistError) or _COLLECTIVE.search(str(error)):
            raise RankLostError(
                f"rank {launch.rank} of {launch.world}, {where()}: a collective failed: {reason}\n{pulse.look_around()}"
            ) from error
        last_words = f"failed, {where()}: {type(error).__name__}: {reason}"
        raise
    except BaseException as error:
        last_words = f"failed, {where()}: {type(error).__name__}: {str(error).strip().partition(chr(10))[0]}"
        raise
    finally:
        over.set()
        thread.join()
        with contextlib.suppress(RuntimeError):
            pulse.say(last_words or "ended")


class _Pulse:
    """This rank's own connection to the store: a store that does not answer must hold up nobody else."""

    def __init__(self, launch: Launch, where: Callable[[], str]) -> None:
        self.rank, self._world, self._where, self._count = launch.rank, launch.world, where, 0
        self._address = f"{os.environ['MASTER_ADDR']}:{os.environ['MASTER_PORT']}"
        self._store = dist.TCPStore(  # type: ignore[attr-defined]
            os.environ["MASTER_ADDR"],
            int(os.environ["MASTER_PORT"]),
            is_master=False,
            wait_for_workers=False,
            timeout=timedelta(seconds=10),
        )
        self.beat()

    def beat(self) -> None:
        self._count += 1
        self.say(f"{self._count} {self._where()}")

    def say(self, words: str) -> None:
        self._store.set(f"heartbeat/{self.rank}", words)

    def hear(self) -> dict[int, str]:
        """What each of the other ranks said last. Raises: RuntimeError, where the store does not answer."""
        keys = {rank: f"heartbeat/{rank}" for rank in range(self._world) if rank != self.rank}
        return {rank: self._store.get(key).decode() for rank, key in keys.items() if self._store.check([key])}

    def look_around(self) -> str:
        """What the other ranks do, in sentences. Takes a few seconds."""
        try:
            before = self.hear()
            time.sleep(3 * PERIOD)
            now = self.hear()
        except RuntimeError:
            return f"Nor does the store at {self._address} answer, which rank 0 or torchrun's agent there holds."
        lost = {rank: words for rank, words in now.items() if words == before.get(rank)}
        if lost:
            return _sentences(lost)
        waiting = "; ".join(f"rank {rank}: {words.partition(' ')[2]}" for rank, words in now.items())
        return f"All ranks are alive. {waiting}."


def _sentences(lost: Mapping[int, str]) -> str:
    lines = []
    for rank, words in lost.items():
        count, _, where = words.partition(" ")
        alive = count.isdigit()
        lines.append(f"Rank {rank} {f'does not answer; it was last heard of at {where}' if alive else words}.")
    return "\n".join(lines)


def _beat(pulse: _Pulse, over: threading.Event, warn_after: float) -> None:
    heard: dict[int, tuple[str, float]] = {}
    warned: set[int] = set()
    looked = time.monotonic()
    while not over.wait(PERIOD):
        try:
            pulse.beat()
            # One rank looks after the others, and another after that one: reading is not for thousands.
            if pulse.rank > 1 or time.monotonic() - looked < warn_after / 4:
                continue
            looked = time.monotonic()
            for rank, words in pulse.hear().items():
                if rank not in heard or heard[rank][0] != words:
                    heard[rank] = words, looked
                elif looked - heard[rank][1] >= warn_after and rank not in warned and words != "ended":
                    warned.add(rank)
                    print(f"for {warn_after:.0f} s: {_sentences({rank: words})}", file=sys.stderr, flush=True)
        except RuntimeError:
            return  # The collective that fails next says more.

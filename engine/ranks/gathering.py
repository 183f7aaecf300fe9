"""Where the ranks of a world find each other. Nobody waits in silence, or longer than it is asked to.

    token       which start this is, from rank 0
    here/T/5    rank 5 has read token T: its own token
    missing/T   whom rank 0 is waiting for, in words
    asked/T     the number of a signal that some rank got
    go/T        from rank 0: the tokens of all that have come, and the number of a signal that ends the start, or 0
    left/T      how many have read of that signal

The store may be one in which ranks have met before that are dead by now, as torchrun keeps it over restarts, which its
agents count differently: so an answer counts only where it holds one's own token.
"""

from __future__ import annotations

import json
import os
import signal
import socket
import sys
import threading
import time
import uuid
from collections.abc import Callable, Iterable
from datetime import timedelta
from typing import Any

import torch.distributed as dist

from engine.config import ConfigError

LIMIT = timedelta(minutes=30)
"""How long ranks are waited for."""

PATIENCE = 10.0
"""Seconds until it is said who is missing; then twice as many, and so on."""

GRACE = 2.0
"""Seconds that ranks which are missing still have when a signal asks for the end."""

LEAVE = 10.0
"""Seconds that rank 0, which may hold the store, gives the others to read of that signal."""

_PAUSE = 0.1
"""Seconds between two looks, at most."""


class StoppedEarly(Exception):  # noqa: N818 - no error
    """A signal has asked for the end before there was anything to save."""

    def __init__(self, number: int) -> None:
        self.signal = signal.Signals(number)
        super().__init__(f"signal {self.signal.name} before the first step: ended; there was nothing to save")


def gather(rank: int, world: int, asked: Callable[[], int]) -> tuple[str, Any]:
    """Waits for all ranks of the world at MASTER_ADDR and MASTER_PORT, and says whom it is waiting for.

    Args:
        asked: the number of a signal that asks for the end, 0 without.

    Returns:
        A word that is this start's alone, and a store of which it is the prefix.

    Raises:
        ConfigError: there is no such address.
        StoppedEarly: a signal came, to this rank or another, and ranks were missing.
        TimeoutError: ranks were missing for too long.
    """
    talk = _Talk(rank, world, *_address())
    who, begin, said = f"rank {rank} of {world}", time.monotonic(), PATIENCE
    first_asked: float | None = None
    # A store that has stopped is waited for without a limit by torch, which knows of no signals: so not by this thread.
    threading.Thread(target=talk.run, name="gathering", daemon=True).start()
    while not talk.done.wait(_PAUSE):
        now = time.monotonic()
        if number := asked():
            first_asked = first_asked or now
            talk.asked = number
            # Rank 0, which ends it for all, is not there, or waits itself for those that have not heard.
            if now - first_asked > 2 * GRACE + (LEAVE if rank == 0 else 0):
                raise StoppedEarly(number)
        if now - begin > LIMIT.total_seconds():
            raise TimeoutError(f"{who}: {talk.missing} did not come within {now - begin:.0f} s")
        if now - begin > said and os.environ.get("LOCAL_RANK", "0") == "0":  # one voice a machine
            said *= 2
            print(f"{who} waits for {talk.missing}: {now - begin:.0f} s by now", file=sys.stderr, flush=True)
    if talk.error is not None:
        raise talk.error
    return talk.token, talk.store


def _address() -> tuple[str, int]:
    host, port = os.environ.get("MASTER_ADDR"), os.environ.get("MASTER_PORT", "")
    if not host or not port.isdecimal() or not 0 < int(port) < 2**16:
        raise ConfigError(
            f"RANK is set, and MASTER_ADDR = {host!r}, MASTER_PORT = {port!r}: expected the address and the port where "
            "the ranks meet, as torchrun sets them"
        )
    return host, int(port)


class _Talk:
    """What a rank does to be found, in a thread of its own."""

    def __init__(self, rank: int, world: int, host: str, port: int) -> None:
        self._rank, self._world, self._host, self._port = rank, world, host, port
        self.done = threading.Event()
        self.token = ""
        self.store: Any = None
        self.error: Exception | None = None
        self.asked = 0
        """The number of a signal that this rank got."""
        self.missing = f"the store at {host}:{port}, which rank 0 or its torchrun opens"
        """Who or what is waited for."""

    def run(self) -> None:
        try:
            store = self._connect()
            self.token = self._call(store) if self._rank == 0 else self._answer(store)
            store.set_timeout(LIMIT)
            self.store = dist.PrefixStore(self.token, store)  # type: ignore[attr-defined]
        except StoppedEarly as stopped:
            self.error = stopped
        except (RuntimeError, OSError) as error:  # torch's DistError is one
            gone = f"rank {self._rank} of {self._world}: {self._host}:{self._port}, where the ranks meet: {error}"
            self.error = StoppedEarly(self.asked) if self.asked else RuntimeError(gone.partition("\n")[0])
        self.done.set()

    def _connect(self) -> Any:
        # torchrun says where it has opened one.
        master = self._rank == 0 and os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True"
        # torch tells of each attempt that fails.
        pause = 0.001
        while not master and not _answers(self._host, self._port):
            time.sleep(pause)
            pause = min(2 * pause, _PAUSE)
        return dist.TCPStore(  # type: ignore[attr-defined]
            self._host, self._port, is_master=master, wait_for_workers=False, multi_tenant=True
        )

    def _call(self, store: Any) -> str:
        """Rank 0's part. Returns: the token of this start."""
        token, pause, asked_at = _token(), 0.001, 0.0
        store.set("token", token)
        here = {0: _token()}
        while len(here) < self._world:
            absent = [rank for rank in range(self._world) if rank not in here]
            for rank in absent:
                if _has(store, key := f"here/{token}/{rank}"):
                    here[rank] = store.get(key).decode()
            if len(here) == self._world:
                break
            self.missing = _in_words(rank for rank in absent if rank not in here)
            store.set(f"missing/{token}", self.missing)
            number = self.asked or (int(store.get(f"asked/{token}")) if _has(store, f"asked/{token}") else 0)
            if number:
                asked_at = asked_at or time.monotonic()
                if time.monotonic() - asked_at > GRACE:
                    store.set(f"go/{token}", json.dumps([number, here]))
                    # The store may go with this process.
                    for _ in range(int(LEAVE / _PAUSE)):
                        if store.add(f"left/{token}", 0) == len(here) - 1:
                            break
                        time.sleep(_PAUSE)
                    raise StoppedEarly(number)
            time.sleep(pause)
            pause = min(2 * pause, _PAUSE)
        store.set(f"go/{token}", json.dumps([0, here]))
        return token

    def _answer(self, store: Any) -> str:
        """The others' part. Returns: the token of this start."""
        own, token, pause = _token(), "", 0.001
        while True:
            if _has(store, "token") and (found := store.get("token").decode()) != token:
                token = found
                store.set(f"here/{token}/{self._rank}", own)
            if _has(store, f"go/{token}"):
                number, here = json.loads(store.get(f"go/{token}"))
                if here.get(str(self._rank)) == own:
                    if number:
                        store.add(f"left/{token}", 1)
                        raise StoppedEarly(number)
                    return token
            others = store.get(f"missing/{token}").decode() if _has(store, f"missing/{token}") else ""
            self.missing = others if others not in ("", f"rank {self._rank}") else "rank 0"
            if self.asked:
                store.set(f"asked/{token}", str(self.asked))
            time.sleep(pause)
            pause = min(2 * pause, _PAUSE)


def _has(store: Any, key: str) -> bool:
    return bool(store.check([key]))


def _answers(host: str, port: int) -> bool:
    try:
        socket.create_connection((host, port), timeout=GRACE).close()
    except OSError:
        return False
    return True


def _in_words(ranks: Iterable[int]) -> str:
    """Such as "rank 3" or "ranks 1, 2, 5 to 7"."""
    rows: list[list[int]] = []
    for rank in ranks:
        if rows and rows[-1][1] == rank - 1:
            rows[-1][1] = rank
        else:
            rows.append([rank, rank])
    words = [f"{first}" if first == last else f"{first} to {last}" for first, last in rows]
    return f"{'rank' if words == [f'{rows[0][0]}'] else 'ranks'} {', '.join(words)}"


def _token() -> str:
    return uuid.uuid4().hex[:12]

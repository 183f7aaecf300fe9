"""A folder belongs to one run at a time, and a run that has lost its folder writes no more into it.

    FOLDER/owner/7    a token, and which process of which machine has the folder; touched every other second

Whoever wants the folder creates the file of the next number, which only one can, and the highest number counts. So a
run whose folder was taken over while it was cut off from the file server finds, before it writes, that it is no longer
the owner. Whether an owner lives is known from its process where that can be seen from here, else from its file: one
that nobody touches any more was left by a machine that is gone.
"""

from __future__ import annotations

import contextlib
import json
import os
import socket
import threading
import time
import uuid
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

from engine.config import ConfigError
from engine.files import open_to_read
from engine.ranks.gathering import StoppedEarly

BEAT = 2.0
"""Seconds between two signs of life."""

SILENCE = 30.0
"""Seconds without one after which an owner on another machine counts as gone."""

DYING = 6.0
"""Seconds that a process on this machine is given to end, as one that was killed a moment ago."""

_FILE_SIZE = 4096


class FolderLostError(OSError):
    """The folder belongs to another run by now; this one must write no more into it."""


@dataclass(frozen=True)
class _Process:
    """Which process of which machine an owner is."""

    host: str
    boot: str
    """Of the machine since it was started, and"""
    pids: str
    """the namespace of its process ids: only within both does `pid` mean anything."""
    pid: int
    began: str
    token: str


class Owner:
    """What this process holds of a folder: its file there, which it touches until `release`.

    Args:
        path: of the file.
        token: what stands in it.
        made: whether the folder was not there before; it goes again if nothing has come into it.
    """

    def __init__(self, path: Path, token: str, *, made: bool = False) -> None:
        self.path, self.token, self._made = path, token, made
        self.may_vanish = False
        """Whether a folder that is gone altogether is no reason to end."""
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._beat, name="owner", daemon=True)
        self._thread.start()

    def check(self) -> None:
        """Before writing into the folder. Costs the look-up of a small file.

        Raises:
            FolderLostError: the folder has another owner by now.
            OSError: it cannot be known.
        """
        numbers = _numbers(self.path.parent)
        held = holds(self.path, self.token) or (self.may_vanish and not numbers)
        if not held or max(numbers, default=0) > int(self.path.name):
            raise FolderLostError(
                f"{self.path.parent.parent}: another run has taken this folder over, while this one had not been heard "
                f"of for {SILENCE:g} s, or the folder was moved aside; nothing more is written into it from here"
            )

    def release(self) -> None:
        """Gives the folder back, if it is still this one's."""
        self._over.set()
        self._thread.join(BEAT)
        with contextlib.suppress(OSError):
            if holds(self.path, self.token):
                self.path.unlink()
            self.path.parent.rmdir()
            if self._made:
                self.path.parent.parent.rmdir()

    def _beat(self) -> None:
        while not self._over.wait(BEAT):
            # A file server that is away for a while; who has taken over meanwhile is found before something is written.
            with contextlib.suppress(OSError):
                os.utime(self.path, follow_symlinks=False)


def take(folder: Path, what: str, asked: Callable[[], int], say: Callable[[str], None]) -> Owner:
    """Takes a folder, which is made if it is not there, from nobody or from an owner that is gone.

    Args:
        what: the folder, in the words of an error, such as "dir = 'runs/a'".
        asked: the number of a signal that ends the wait, 0 without.
        say: told what is waited for.

    Raises:
        ConfigError: another run has it, and lives.
        StoppedEarly: a signal has ended the wait.
        OSError: it cannot be written to.
    """
    made = not folder.exists()
    while True:
        place = folder / "owner"
        place.mkdir(parents=True, exist_ok=True)
        last = max(_numbers(place), default=0)
        if last:
            _wait_for_the_end_of(place / str(last), what, asked, say)
        path, token = place / str(last + 1), uuid.uuid4().hex
        try:
            # A link or a pipe in its place is no file that could be created.
            descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o644)
        except (FileExistsError, FileNotFoundError):  # Somebody was faster, or has just given the folder back.
            continue
        try:
            with os.fdopen(descriptor, "w", encoding="utf-8") as file:
                json.dump(asdict(_this_process(token)), file)
                file.flush()
                os.fsync(file.fileno())
        except OSError as error:
            path.unlink(missing_ok=True)
            raise OSError(error.errno, error.strerror, str(path)) from None
        for number in _numbers(place):
            if number <= last:
                (place / str(number)).unlink(missing_ok=True)
        return Owner(path, token, made=made)


def holds(path: Path, token: str) -> bool:
    """Whether an owner's file is there, with its token. Raises: OSError, where that cannot be known."""
    try:
        return _read(path)[0].get("token") == token
    except FileNotFoundError:
        return False


def user_of(folder: Path) -> str | None:
    """In words, whose run has a folder at the moment, as far as can be seen without waiting; None: nobody's."""
    place = folder / "owner"
    try:
        found, touched = _read(place / str(max(_numbers(place))))
    except (ValueError, OSError):
        return None
    lives = _lives(found)
    if lives is None:
        lives = time.time() - touched / 1e9 < SILENCE
    return _in_words(found) if lives else None


def _numbers(place: Path) -> list[int]:
    try:
        return [int(name) for name in os.listdir(place) if name.isdecimal() and len(name) < 19]
    except (FileNotFoundError, NotADirectoryError):
        return []


def _wait_for_the_end_of(path: Path, what: str, asked: Callable[[], int], say: Callable[[str], None]) -> None:
    """Returns when an owner has given the folder back or is gone. Raises: ConfigError, as it lives."""
    since, first = time.monotonic(), None
    while True:
        try:
            found, touched = _read(path)
        except FileNotFoundError:
            return
        lives, waited = _lives(found), time.monotonic() - since
        if lives is False:
            return
        if first is None:
            first = touched
            if lives is None:
                say(f"{what}: was in use by {_in_words(found)}; waiting {SILENCE:g} s for a sign of life of it")
        if touched != first or (lives and waited > DYING):
            raise ConfigError(
                f"{what}: is in use by {_in_words(found)}, which is still running; a folder belongs to one run at "
                "a time: wait for that one or end it, or give this one another name= or dir="
            )
        if waited > SILENCE:
            return
        if number := asked():
            say(f"{what}: was in use by {_in_words(found)}; a signal has ended the wait for it")
            raise StoppedEarly(number)
        time.sleep(0.1)


def _read(path: Path) -> tuple[dict[str, object], int]:
    """What an owner's file says, {} where it says nothing, and when it was touched last, in ns."""
    # Opened each time: a file server is asked only then what others have done.
    with open_to_read(path) as file:
        text, touched = file.read(_FILE_SIZE), os.fstat(file.fileno()).st_mtime_ns
    try:
        found = json.loads(text)
    except (ValueError, RecursionError):
        found = {}
    return found if isinstance(found, dict) else {}, touched


def _in_words(found: dict[str, object]) -> str:
    return (
        f"process {found['pid']!s:.20} on {found['host']!s:.64}" if {"pid", "host"} <= found.keys() else "another run"
    )


def _this_process(token: str) -> _Process:
    pid = os.getpid()
    return _Process(socket.gethostname(), _boot(), _namespace(), pid, _began(pid) or "", token)


def _lives(found: dict[str, object]) -> bool | None:
    """Whether an owner's process is there; None where that cannot be seen from here."""
    pid = found.get("pid")
    if not _boot() or (found.get("boot"), found.get("pids")) != (_boot(), _namespace()) or not isinstance(pid, int):
        return None
    return _began(pid) == found.get("began")


def _boot() -> str:
    with contextlib.suppress(OSError):
        return Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    return ""


def _namespace() -> str:
    with contextlib.suppress(OSError):
        return os.readlink("/proc/self/ns/pid")
    return ""


def _began(pid: int) -> str | None:
    """When a process was started, by the machine's clock; None for one that is not there or has ended."""
    with contextlib.suppress(OSError):
        # Behind the name of the program, which may hold anything: state, ..., start time.
        fields = Path(f"/proc/{pid}/stat").read_text(errors="replace").rpartition(")")[2].split()
        return None if fields[0] in "ZX" else fields[19]
    return None

"""What is printed, aside of training: a pipe that nobody reads, or a slow disk under a log, holds nothing up."""

from __future__ import annotations

import contextlib
import os
import sys
from typing import Any, TextIO

from engine.reporting.aside import Aside

ROOM = 100_000
"""Texts that wait to be printed; what comes when there is no room is lost."""

PATIENCE = 3.0
"""Seconds that the end of a run waits for somebody to take what it has printed."""


class Stderr:
    """stderr; what it does not take is lost: the log of a job may lie on the disk that is full."""

    def __init__(self) -> None:
        self._aside = Aside("stderr", ROOM)

    def __getattr__(self, name: str) -> Any:
        return getattr(sys.stderr, name)

    def write(self, text: str) -> None:
        """Has it printed."""
        self._aside.do(lambda: write_now(sys.stderr, text))

    def flush(self) -> None:
        """Does nothing: what is written is printed as soon as it can be."""

    def close(self) -> None:
        """Waits until all is printed, but not for long."""
        self._aside.wait(PATIENCE)
        self._aside.end()


def print_soon(text: str) -> None:
    """Prints to standard output. Raises: OSError, also where nobody takes it for a while."""
    refusal: list[OSError] = []

    def act() -> None:
        try:
            write_now(sys.stdout, text, strict=True)
        except OSError as error:
            refusal.append(error)

    aside = Aside("stdout", 1)
    aside.do(act)
    taken = aside.wait(PATIENCE)
    aside.end()
    if refusal:
        raise refusal[0]
    if not taken:
        raise TimeoutError(f"nobody has taken it for {PATIENCE:g} s")


def write_now(stream: TextIO, text: str, *, strict: bool = False) -> None:
    """Writes around the stream's own buffer where there is a file behind it: the process could not end while a thread
    waits within that.

    Args:
        strict: whether to raise an OSError.
    """
    with contextlib.nullcontext() if strict else contextlib.suppress(OSError, ValueError):
        try:
            number = stream.fileno()
        except (OSError, ValueError):  # as in a notebook
            stream.write(text)
            return
        stream.flush()
        rest = text.encode(stream.encoding or "utf-8", "backslashreplace")
        while rest:
            rest = rest[os.write(number, rest) :]

"""Somewhere that metrics are sent beside the run's own file, aside of training."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from engine.reporting.aside import Aside

ROOM = 10_000
"""Lines that wait in memory where the sink takes none."""


class Sink:
    """Whatever it raises, and however long it takes, training goes on. What fails once is told once, and left.

    Args:
        name: of the sink, as a person knows it.
        folder: of the run.
        say: told why there will be no more. From the sink's thread, too.
    """

    def __init__(self, name: str, folder: Path, say: Callable[[str], None]) -> None:
        self._name, self._say = name, say
        self._instead = f"metrics are in {folder / 'metrics.jsonl'}"
        self._gone = False
        self._aside = Aside(name, ROOM)

    def _do(self, action: Callable[[], object]) -> None:
        """Has something done, after all that was asked before."""
        if not self._gone and not self._aside.do(lambda: self._attempt(action)):
            self._leave(f"has not taken {ROOM} lines; going on without it, {self._instead}")

    def _attempt(self, action: Callable[[], object]) -> None:
        if self._gone:
            return
        try:
            action()
        except Exception as error:  # Of another's making: there is no telling which.
            self._leave(f"{error}; going on without it, {self._instead}")

    def _leave(self, why: str) -> None:
        if not self._gone:
            self._say(f"{self._name}: {why}")
        self._gone = True

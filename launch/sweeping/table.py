"""A sweep as it goes on: a table that is drawn anew on a terminal, and lines now and then in a log file."""

from __future__ import annotations

import shutil
import sys
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from engine.config.grid import Cell
from engine.reporting.bar import clock
from launch.sweeping import cells as on_disk
from launch.sweeping.cells import Standing, State

EVERY_TERMINAL, EVERY_LOG = 2.0, 60.0
"""Seconds between two looks at all runs."""

_ORDER: dict[State, int] = {"running": 0, "failed": 1, "interrupted": 2, "waiting": 3, "complete": 4}


class Table:
    """What a person sees of a sweep, on stderr."""

    def __init__(self, folder: Path, cells: Sequence[Cell]) -> None:
        self._folder, self._cells = folder, {cell.name: cell for cell in cells}
        self._terminal = sys.stderr.isatty()
        self._drawn = 0
        self._begin = self._next = time.monotonic()
        self._started: dict[str, float] = {}
        self._found: dict[str, Standing] = {}
        self._before = 0.0

    def say(self, text: str) -> None:
        """A line above the table."""
        self._erase()
        print(text, file=sys.stderr, flush=True)

    def begin(self) -> None:
        """Counts what is there already."""
        self._look(self._cells)
        self._before = self._done()
        self.say(f"{self._heading()}; {self._folder}")

    def started(self, cell: Cell, log: Path) -> None:
        """A run has been started."""
        self._started[cell.name] = time.monotonic()
        if not self._terminal:
            self.say(f"{_now()} {cell.name}: started; {log}")

    def ended(self, cell: Cell, failure: str) -> None:
        """A run has ended, or failed with a line of an error."""
        took = time.monotonic() - self._started.pop(cell.name)
        self._look([cell.name])
        found = self._found[cell.name]
        top1 = "" if found.top1 is None else f", top-1 {found.top1:.2f} %"
        self.say(f"{_now()} {cell.name}: {found.state} after {clock(took)}{f': {failure}' if failure else top1}")

    def show(self) -> None:
        """Looks at the runs and draws them, if it is time to."""
        if time.monotonic() < self._next:
            return
        self._next = time.monotonic() + (EVERY_TERMINAL if self._terminal else EVERY_LOG)
        self._look([name for name in self._cells if self._found[name].state != "complete"])
        if not self._terminal:
            going = [f"{name} {_short(self._found[name])}" for name in self._started]
            self.say(f"{_now()} {self._heading()}{': ' if going else ''}{'; '.join(going)}")
            return
        size = shutil.get_terminal_size()
        rows = sorted(self._found.items(), key=lambda row: _ORDER[row[1].state])
        room = max(1, size.lines - 4)
        lines = [self._heading(), *as_text(rows[:room]).splitlines()]
        lines += [f"... and {len(rows) - room} more"] * (len(rows) > room)
        self._erase()
        print(*(line[: size.columns - 1] for line in lines), sep="\n", file=sys.stderr, flush=True)
        self._drawn = len(lines)

    def end(self) -> bool:
        """The whole table. Returns: whether all runs are complete."""
        self._look(self._cells)
        self.say(f"\n{as_text(list(self._found.items()))}\n\n{self._heading(left=False)}")
        return all(found.state == "complete" for found in self._found.values())

    def _look(self, names: Sequence[str] | dict[str, Cell]) -> None:
        for name in names:
            found = on_disk.standing(self._folder, self._cells[name])
            # A run that is starting has not taken its folder yet.
            self._found[name] = replace(found, state="running", said="") if name in self._started else found

    def _done(self) -> float:
        """In whole runs."""
        return sum(found.share for found in self._found.values())

    def _heading(self, *, left: bool = True) -> str:
        counts = Counter(found.state for found in self._found.values())
        parts = [f"{counts[state]} {state}" for state in _ORDER if state != "complete" and counts[state]]
        text = f"{counts['complete']} of {len(self._cells)} runs complete"
        done = self._done() - self._before
        passed = time.monotonic() - self._begin
        if left and done > 0 and (rest := len(self._cells) - self._done()) > 0:
            parts.append(f"about {clock(passed * rest / done)} left")
        return ", ".join([text, *parts])

    def _erase(self) -> None:
        if self._drawn:
            print(f"\x1b[{self._drawn}F\x1b[J", end="", file=sys.stderr)
        self._drawn = 0


def as_text(rows: Sequence[tuple[str, Standing]]) -> str:
    """The runs by name, a line each."""
    width = max(len(name) for name, _ in rows)
    lines = [f"{'run'.ljust(width)}  state        epoch  top-1 %"]
    for name, found in rows:
        top1 = "-" if found.top1 is None else f"{found.top1:.2f}"
        text = f"{name.ljust(width)}  {found.state:<11}  {found.epoch:>5.4g}  {top1:>7}  {found.said}"
        lines.append(text.rstrip())
    return "\n".join(lines)


def _short(found: Standing) -> str:
    return f"epoch {found.epoch:.4g}" + ("" if found.top1 is None else f", top-1 {found.top1:.2f} %")


def _now() -> str:
    return time.strftime("%H:%M:%S")

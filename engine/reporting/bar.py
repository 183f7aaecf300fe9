"""Where a run is, for a person: a bar on a terminal, lines now and then in a log, which has no carriage returns."""

from __future__ import annotations

import sys
import time
from typing import Any

from tqdm import tqdm

EVERY = 60.0
"""Seconds between two lines in a log file."""


class Bar:
    """Shows steps as they are done, and what a line of metrics says beside them."""

    def __init__(self, title: str, step: int, steps: int, file: Any, *, shown: bool) -> None:
        self._title, self._steps, self._file = title, steps, file
        self._terminal = shown and sys.stderr.isatty()
        self._lines = shown and not self._terminal
        self._tqdm = tqdm(
            file=file,
            total=steps,
            initial=step,
            desc=title,
            unit="step",
            disable=not self._terminal,
            dynamic_ncols=True,
            mininterval=0.2,
        )
        self._step = self._begin = step
        self._since: float | None = None
        self._next = 0.0
        self.words = ""
        """What stands beside the steps."""

    def at(self, step: int, words: str, *, news: bool) -> None:
        """So many steps are done.

        Args:
            news: whether a line of metrics has brought other words.
        """
        now = time.monotonic()
        if self._since is None:  # The first step has warmed everything up; what it took says nothing.
            self._since, self._begin = now, step
        self._step, self.words = step, words
        if self._terminal:
            self._tqdm.set_postfix_str(words, refresh=False)
            self._tqdm.update(step - self._tqdm.n)
        elif self._lines and news and (now >= self._next or step == self._steps):
            self._next = now + EVERY
            left = self.left
            rest = f"; {clock(left)} left" if left else ""
            self.say(f"{self._title}: step {step:,} of {self._steps:,}, {words}{rest}")

    @property
    def left(self) -> float | None:
        """Seconds until the last step, at the pace of this start; None while that is not known."""
        done = self._step - self._begin
        if self._since is None or done < 1:
            return None
        return (self._steps - self._step) * (time.monotonic() - self._since) / done

    def say(self, text: str) -> None:
        """Prints a line without breaking the bar."""
        if self._terminal:
            self._tqdm.write(text, file=self._file)
        else:
            self._file.write(f"{text}\n")

    def close(self) -> None:
        """Leaves the bar as it is."""
        self._tqdm.close()


def clock(seconds: float) -> str:
    """As 1:02:03."""
    minutes, rest = divmod(int(seconds), 60)
    return f"{minutes // 60}:{minutes % 60:02d}:{rest:02d}"

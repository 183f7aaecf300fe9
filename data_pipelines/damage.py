"""Samples that cannot be read: which, why, how often, and whether the run may go on."""

import threading
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Literal

FETCH = "Fetch the file again, or take it out"


class DataError(ValueError):
    """Data cannot be read: missing, cut short or wrong. The message says what, where, and how to get it right."""


class UnreadableError(Exception):
    """A sample cannot be read; the message says what was expected and found."""


@dataclass(frozen=True)
class Damaged:
    """A sample that cannot be read."""

    split: str
    path: str
    reason: str


class Damage:
    """What was met so far. Any thread may tell of more.

    Args:
        on_error: ``replace`` to go on, ``raise`` to end at the first.
        max_bad: the part of a split that may be damaged; one sample always may, unless it is 0.
        sizes: samples of each split.
    """

    def __init__(self, on_error: Literal["replace", "raise"], max_bad: float, sizes: Mapping[str, int]) -> None:
        self._on_error, self._max_bad, self._sizes = on_error, max_bad, sizes
        self._lock = threading.Lock()
        self._new: Counter[Damaged] = Counter()
        self._paths: dict[str, set[str]] = {split: set() for split in sizes}

    def tell(self, damaged: Damaged, *, counts: bool = True) -> None:
        """Counts a sample that is shown as another, or counted as wrong.

        Args:
            counts: whether this is a meeting that no other rank counts, and that has not been counted yet.

        Raises:
            DataError: the run is to end at the first, or there are too many.
        """
        if self._on_error == "raise":
            raise DataError(f"{damaged.path}: {damaged.reason}. {FETCH}")
        with self._lock:
            self._new[damaged] += counts
        self.check([damaged])

    def check(self, found: Iterable[Damaged]) -> None:
        """Takes notice of samples that this or another rank has met.

        Raises:
            DataError: there are more than `max_bad` of a split.
        """
        with self._lock:
            for damaged in found:
                self._paths[damaged.split].add(damaged.path)
            counts = {split: len(paths) for split, paths in self._paths.items()}
        for split, count in counts.items():
            size = self._sizes[split]
            if count > max(int(self._max_bad * size), self._max_bad > 0):
                example = next(iter(sorted(self._paths[split])))
                raise DataError(
                    f"max_bad: {count} of {size} {split} files cannot be read, more than max_bad = {self._max_bad:g} "
                    f"of them; one is {example}. {FETCH}, or allow more"
                )

    def take(self) -> dict[Damaged, int]:
        """What was told since the last call, and how often."""
        with self._lock:
            new, self._new = dict(self._new), Counter()
        return new

    @property
    def counts(self) -> dict[str, int]:
        """Damaged samples of each split, as far as known."""
        with self._lock:
            return {split: len(paths) for split, paths in self._paths.items()}

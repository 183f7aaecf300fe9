"""What a source gives: the bytes of a sample by its id, wherever they lie."""

import copy
from abc import ABC, abstractmethod
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray
from typing_extensions import Self


class Source(ABC):
    """One split of photos. An id is a place in it, 0 .. N - 1, and means the same photo on every machine.

    Attributes:
        classes: names, in the order of the labels.
        labels: class of each sample, int64 [N].
        remarks: what whoever starts a run may want to know: what is left out, and how often.
    """

    classes: tuple[str, ...]
    labels: NDArray[np.int64]
    remarks: tuple[str, ...] = ()

    def __len__(self) -> int:
        return len(self.labels)

    @abstractmethod
    def read(self, index: int) -> bytes:
        """The encoded photo. Any thread may ask. Raises: UnreadableError."""

    @abstractmethod
    def place(self, index: int) -> str:
        """Where a sample lies, for a person: a path, or SHARD!MEMBER."""

    @abstractmethod
    def place_of_class(self, label: int) -> str:
        """Where the samples of a class lie, for a person."""

    @abstractmethod
    def digest(self) -> str:
        """SHA-256, as hex digits, of what the samples are called, in their order."""

    def relabelled(self, classes: tuple[str, ...], places: NDArray[np.int64]) -> Self:
        """The same samples under other classes: those that were of class k are of class places[k]."""
        other = copy.copy(self)
        other.classes, other.labels = classes, places[self.labels]
        return other


def left_out(counts: Sequence[tuple[str, int]], where: str) -> tuple[str, ...]:
    """A remark of what is there and not used; none where nothing is.

    Args:
        counts: of each kind of thing, its name and how many there are.
        where: they are.
    """
    found = [f"{count:,} {what}" for what, count in counts if count]
    return (f"left out of {where}: {', '.join(found)}",) if found else ()

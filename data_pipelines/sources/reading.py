"""Photos of a source: their bytes and sizes, and what takes the place of those that cannot be read."""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from data_pipelines.damage import FETCH, Damage, Damaged, DataError, UnreadableError
from data_pipelines.sources.contract import Source
from data_pipelines.sources.files import measured, stand_in


@dataclass(frozen=True)
class Read:
    """Encoded photos.

    Attributes:
        ids: which samples these are; not those that were asked for where some were replaced: int64 [n].
        encoded: the bytes of each, uint8.
        sizes: (height, width) of each, int64 [n, 2].
        readable: whether it is the sample, or stands in for one that is to be counted as wrong: bool [n].
    """

    ids: NDArray[np.int64]
    encoded: list[NDArray[np.uint8]]
    sizes: NDArray[np.int64]
    readable: NDArray[np.bool_]


class Reader:
    """Reads encoded photos, and remembers the size of each once its header was seen.

    Args:
        source: of the photos.
        split: its name, train or val.
        damage: is told of photos that cannot be read.
    """

    def __init__(self, source: Source, split: str, damage: Damage) -> None:
        self.source, self._split, self._damage = source, split, damage
        self._sizes = np.zeros((len(source), 2), np.int32)

    def tell(self, index: int, reason: str, *, counts: bool) -> None:
        """Tells that a sample cannot be used. Raises: DataError, where the run is to end for it."""
        self._damage.tell(Damaged(self._split, self.source.place(index), reason), counts=counts)

    def read(
        self,
        ids: NDArray[np.int64],
        among: NDArray[np.int64],
        counted: NDArray[np.bool_],
        broken: frozenset[int] = frozenset(),
    ) -> Read:
        """Reads samples to train on. One that cannot be read is replaced by the next of its class that can, the last
        one by the first: by a rule of the id alone, so that all ranks replace alike.

        Args:
            ids: which, int64 [n].
            among: what may take their places, ascending, int64.
            counted: of which of them it is counted if they cannot be read, [n].
            broken: those that are there and cannot be decoded; whoever found that has told of it. Where there are any,
                the samples are read again, and nothing is counted a second time.

        Raises:
            DataError: nothing of a class can be read, or the run is to end for what cannot.
        """
        counted = counted & (not broken)
        each = zip(ids.tolist(), counted.tolist(), strict=True)
        read = [self._or_next(index, among, broken, counts) for index, counts in each]
        used = np.array([index for index, _ in read], np.int64)
        return Read(used, [encoded for _, encoded in read], self._sizes[used].astype(np.int64), np.ones(len(ids), bool))

    def read_as_they_are(
        self, ids: NDArray[np.int64], counted: NDArray[np.bool_], broken: frozenset[int] = frozenset()
    ) -> Read:
        """Reads samples of which each is wanted once; something grey stands in for one that cannot be read. See `read`
        for `counted` and `broken`.

        Raises:
            DataError: the run is to end for it.
        """
        encoded, sizes, readable = [], np.empty((len(ids), 2), np.int64), np.ones(len(ids), bool)
        counted = counted & (not broken)
        for row, index in enumerate(ids):
            found = None if int(index) in broken else self._told(int(index), counts=bool(counted[row]))
            if found is None:
                found, sizes[row] = stand_in()
                readable[row] = False
            else:
                sizes[row] = self._sizes[index]
            encoded.append(found)
        return Read(ids, encoded, sizes, readable)

    def _or_next(
        self, wanted: int, among: NDArray[np.int64], broken: frozenset[int], counts: bool
    ) -> tuple[int, NDArray[np.uint8]]:
        if wanted not in broken and (encoded := self._told(wanted, counts=counts)) is not None:
            return wanted, encoded
        label = self.source.labels[wanted]
        kin = among[self.source.labels[among] == label]
        after = np.searchsorted(kin, wanted, side="right")
        for index in np.roll(kin, -after).tolist():
            if index != wanted and index not in broken and (encoded := self._told(index, counts=counts)) is not None:
                return index, encoded
        raise DataError(
            f"{self.source.place_of_class(int(label))}: expected at least one image that can be read, found "
            f"{len(kin)} that cannot. {FETCH}"
        )

    def _told(self, index: int, *, counts: bool) -> NDArray[np.uint8] | None:
        """The bytes of a sample; None where they are no image, which is told."""
        try:
            content = self.source.read(index)
            if not self._sizes[index, 0]:
                self._sizes[index] = measured(content)
        except UnreadableError as error:
            self.tell(index, str(error), counts=counts)
            return None
        return np.frombuffer(content, np.uint8)

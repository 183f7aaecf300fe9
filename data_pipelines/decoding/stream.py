"""Batches read and decoded some steps ahead; what cannot be decoded is found, told, and left out of the batch."""

from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace
from itertools import islice
from typing import Generic, Protocol, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray

from data_pipelines.decoding.contract import Decoder, Plan, Work

READERS = 4  # threads that read files, a batch each
_IN_FLIGHT = 2  # batches that the decoder works on while the network trains


class _HasWork(Protocol):
    @property
    def work(self) -> Work: ...


_Prepared = TypeVar("_Prepared", bound=_HasWork)


@dataclass
class Stream(Generic[_Prepared]):
    """One pass over some steps.

    Attributes:
        plan: of the decoder.
        make: builds a decoder for a plan.
        decoder: the first one, none of whose batches is on its way; afterwards the last one.
        prepare: makes a step's batch without the samples that are named, which cannot be decoded.
        tell: takes the place in its batch, the id and the size in bytes of such a sample, and may raise.
    """

    plan: Plan
    make: Callable[[Plan], Decoder]
    decoder: Decoder
    prepare: Callable[[int, frozenset[int]], _Prepared]
    tell: Callable[[int, int, int], None]

    def __call__(
        self, pool: ThreadPoolExecutor, steps: range
    ) -> Iterator[tuple[_Prepared, list[torch.Tensor], NDArray[np.int64]]]:
        """Yields what was prepared, the pixels of its views and the ids, for each step in order."""
        self._pending: deque[tuple[int, _Prepared]] = deque()
        for step, prepared in _ahead(pool, self.prepare, steps):
            self._pending.append((step, prepared))
            try:
                self.decoder.feed(prepared.work)
            except Exception as error:  # whatever a decoder, or a library under it, makes of bytes that are wrong
                self._mend(error)
            if len(self._pending) > _IN_FLIGHT:
                yield self._next()
        while self._pending:
            yield self._next()

    def _next(self) -> tuple[_Prepared, list[torch.Tensor], NDArray[np.int64]]:
        while True:
            try:
                views, ids = self.decoder.take()
            except Exception as error:
                self._mend(error)
            else:
                return self._pending.popleft()[1], views, ids

    def _mend(self, error: Exception) -> None:
        """The decoder names only the batch that stopped it, and is of no use afterwards.

        What cannot be decoded may be a matter of the window, so nothing is remembered for other steps: a row would else
        depend on what its rank has met before.
        """
        found = False
        for place, (step, prepared) in enumerate(self._pending):
            broken: frozenset[int] = frozenset()
            while more := self._broken(prepared.work):
                found = True
                for index in more:
                    self.tell(index, int(prepared.work.ids[index]), prepared.work.encoded[index].size)
                broken |= {int(prepared.work.ids[index]) for index in more}
                prepared = self.prepare(step, broken)
            self._pending[place] = (step, prepared)
        if not found:
            raise error
        self.decoder = self.make(self.plan)
        for _, prepared in self._pending:
            self.decoder.feed(prepared.work)

    def _broken(self, work: Work) -> list[int]:
        """The rows that cannot be decoded, each tried alone."""
        single = replace(self.plan, largest=1)
        decoder, found = self.make(single), []
        for index in range(len(work.ids)):
            try:
                decoder.feed(work.one(index))
                decoder.take()
            except Exception:
                found.append(index)
                decoder = self.make(single)
        return found


def _ahead(
    pool: ThreadPoolExecutor, prepare: Callable[[int, frozenset[int]], _Prepared], steps: range
) -> Iterator[tuple[int, _Prepared]]:
    """Yields each step and what ``prepare`` gives for it, in order, while the pool is some steps ahead."""
    left, none = iter(steps), frozenset[int]()
    futures: deque[Future[_Prepared]] = deque(pool.submit(prepare, step, none) for step in islice(left, READERS))
    try:
        for step in steps:
            prepared = futures.popleft().result()
            futures.extend(pool.submit(prepare, step, none) for step in islice(left, 1))
            yield step, prepared
    finally:
        for future in futures:
            future.cancel()

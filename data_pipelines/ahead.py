"""Work that is done in a thread while its result before is used."""

from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

_T = TypeVar("_T")


def one_ahead(items: Iterator[_T], action: Callable[[_T], _T]) -> Iterator[_T]:
    """Yields what an action makes of each item, in order; a thread of its own takes the next one and acts meanwhile.

    Where the caller stops early, the items are closed once that thread has done with what it had begun.

    Raises:
        whatever the items or the action raise, where the item would have come.
    """
    end = object()

    def following() -> _T | object:
        for item in items:
            return action(item)
        return end

    with ThreadPoolExecutor(1, thread_name_prefix="cohort-ahead") as pool:
        future = pool.submit(following)
        try:
            while (found := future.result()) is not end:
                future = pool.submit(following)
                yield found  # type: ignore[misc]
        finally:
            future.exception()  # waits; the thread may be in the middle of the items
            if close := getattr(items, "close", None):
                close()

"""Work ahead of its use: order, errors in their place, and an end before the end."""

import threading
from collections.abc import Iterator

import pytest

from data_pipelines.ahead import one_ahead


def test_all_items_in_their_order_each_acted_on_in_another_thread() -> None:
    where: list[int] = []

    def act(item: int) -> int:
        where.append(threading.get_ident())
        return 2 * item

    assert list(one_ahead(iter(range(5)), act)) == [0, 2, 4, 6, 8]
    assert threading.get_ident() not in where
    assert list(one_ahead(iter(()), act)) == []


def test_the_next_one_is_begun_before_this_one_is_given_back() -> None:
    begun = [threading.Event() for _ in range(3)]

    def items() -> Iterator[int]:
        for k, event in enumerate(begun):
            event.set()
            yield k

    found = one_ahead(items(), lambda k: k)
    for k in range(2):
        assert next(found) == k
        assert begun[k + 1].wait(10)


def test_an_error_comes_where_its_item_would_have_come() -> None:
    def items() -> Iterator[int]:
        yield 1
        raise RuntimeError("damaged")

    found = one_ahead(items(), lambda k: k)
    assert next(found) == 1
    with pytest.raises(RuntimeError, match="damaged"):
        next(found)


def test_who_stops_early_closes_the_items() -> None:
    closed = threading.Event()

    def items() -> Iterator[int]:
        try:
            yield from range(100)
        finally:
            closed.set()

    found = one_ahead(items(), lambda k: k)
    assert next(found) == 0
    found.close()  # type: ignore[attr-defined]
    assert closed.is_set()

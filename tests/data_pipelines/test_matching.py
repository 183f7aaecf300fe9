"""Classes of other data by name."""

from __future__ import annotations

import pytest

from data_pipelines import DataError
from data_pipelines.matching import match

WNIDS = [f"n{k:02d}" for k in range(12)]
SORTED_NUMBERS = ["0", "1", "10", "11", "2", "3", "4", "5", "6", "7", "8", "9"]


def test_names_are_matched_in_whatever_order() -> None:
    places, remark = match(["c", "a"], ["a", "b", "c"])
    assert (places.tolist(), remark) == ([2, 0], "2 of the network's 3 classes")
    assert match(["b", "a"], ["a", "b"])[1] is None


def test_numbers_stand_for_places() -> None:
    """Folders sort as text, 0, 1, 10, 11, 2: each is the place that it names."""
    places, remark = match(SORTED_NUMBERS, WNIDS)
    assert places.tolist() == [0, 1, 10, 11, 2, 3, 4, 5, 6, 7, 8, 9]
    assert remark == "folders 0 .. 11 stand for places in n00 .. n11"
    places, remark = match(WNIDS, SORTED_NUMBERS)
    assert [SORTED_NUMBERS[place] for place in places] == [str(k) for k in range(12)]
    assert remark is not None


def test_two_lists_of_numbers_are_names() -> None:
    assert match(["10", "2"], SORTED_NUMBERS)[0].tolist() == [2, 4]


@pytest.mark.parametrize("found", [["n00", "n77"], ["0", "12"], ["0", "n01"], ["cat"]])
def test_others_are_refused_by_name(found: list[str]) -> None:
    with pytest.raises(DataError, match="expected classes that the network was trained on"):
        match(found, WNIDS)

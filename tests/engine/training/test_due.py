"""What is due after which step."""

from __future__ import annotations

from typing import Any

import pytest

from engine.training.due import Due, due
from tests.engine.stepping import config_of

EVERY = {
    "train": {"epochs": 4},
    "log": {"every_steps": 3},
    "checkpoint": {"every_epochs": 2, "every_steps": 7},
    "evaluation": {"every_epochs": 3},
}


def after(step: int, stopping: bool = False, **sections: Any) -> Due:
    """In a run of 4 epochs of 5 steps."""
    return due(config_of(**{**EVERY, **sections}), step, 5, stopping=stopping)


NOTHING = Due(line=False, score=False, save=False, ends_epoch=False, ends_run=False)


def steps_with(what: str) -> list[int]:
    return [step for step in range(1, 21) if getattr(after(step), what)]


@pytest.mark.parametrize(
    ("what", "steps"),
    [
        ("ends_epoch", [5, 10, 15, 20]),
        ("ends_run", [20]),
        ("score", [15, 20]),
        ("save", [7, 10, 14, 20]),
        # Every third of an epoch, counted anew in each: its steps 3; and whenever something else is due.
        ("line", [3, 5, 7, 8, 10, 13, 14, 15, 18, 20]),
    ],
)
def test_each_comes_when_its_section_says(what: str, steps: list[int]) -> None:
    assert steps_with(what) == steps


def test_whoever_stops_saves_after_a_line() -> None:
    assert after(1) == NOTHING
    assert after(1, stopping=True) == Due(line=True, score=False, save=True, ends_epoch=False, ends_run=False)


def test_a_run_of_so_many_steps_ends_within_an_epoch() -> None:
    sections = {"train": {"max_steps": 12}, "evaluation": {"every_epochs": None, "every_steps": 4}}
    scored = [step for step in range(1, 13) if after(step, **sections).score]
    assert scored == [4, 8, 12]
    assert after(12, **sections) == Due(line=True, score=True, save=True, ends_epoch=False, ends_run=True)
    assert [step for step in range(1, 13) if after(step, **sections).ends_run] == [12]


def test_without_a_number_of_steps_only_epochs_count() -> None:
    assert after(7, checkpoint={"every_epochs": 1}) == NOTHING
    assert after(5, checkpoint={"every_epochs": 1}) == Due(
        line=True, score=False, save=True, ends_epoch=True, ends_run=False
    )

"""Where a rank is in a run, in words and in an order."""

from __future__ import annotations

from typing import NamedTuple


class Place(NamedTuple):
    """A point of a run. What comes later is greater, in whatever order the parts of a step come."""

    step: int
    """Under way, counted from 1; or done last, where the rank is beside its steps."""
    parts: float
    """Parts of the step that are over; infinite beside the steps, which is after all of them."""
    text: str = ""
    """For a person, such as "step 17, exchange done"."""

    def __str__(self) -> str:
        return self.text

    def is_before(self, other: Place) -> bool:
        """Whether a rank that is here has still to come to where another is."""
        return (self.step, self.parts) < (other.step, other.parts)

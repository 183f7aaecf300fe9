"""Which cases of a test are run each time, and which before a release."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import pytest


def slow(*values: Any) -> Any:
    """Parameters of a test that is run before a release."""
    return pytest.param(*values, marks=pytest.mark.slow)


def often(names: Iterable[str], *chosen: str) -> list[Any]:
    """All cases of a test, of which those that are chosen are run each time."""
    names = list(names)
    assert set(chosen) <= set(names), set(chosen) - set(names)
    return [name if name in chosen else slow(name) for name in names]

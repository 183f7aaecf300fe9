"""Which methods have a use for a peer that is trained already: it shows its signals, and learns nothing."""

from __future__ import annotations

from typing import Any

from losses.capabilities import trunk_of
from losses.contract import Method


def hindrance(method: type[Method], options: Any) -> str | None:
    """Why a method's peers cannot learn from one that is frozen; None where they can."""
    if trunk_of(method, options, 3) is not None:
        return "its peers are branches of one network"
    if method.head is not Method.head:
        return "its peers teach by heads that the method attaches, and those of a frozen one would stay at random"
    if method.exchange == "none":
        return "its peers do not see each other's signals"
    return method.frozen_hindrance

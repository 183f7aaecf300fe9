"""For a method that updates peers one after another instead of all at once.

Had by: dml.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any

from losses.contract import Method


class Turns(ABC):
    """Updates peers in turns, between which signals are exchanged anew."""

    @classmethod
    @abstractmethod
    def turns(cls, options: Any, num_peers: int) -> Sequence[Sequence[int]]:
        """The peers that are updated together, turn after turn; one turn of all where these options have no turns."""


def turns_of(method: type[Method], options: Any, num_peers: int) -> Sequence[Sequence[int]]:
    """The turns of any method: one of all peers where it has none of its own."""
    return method.turns(options, num_peers) if issubclass(method, Turns) else (range(num_peers),)

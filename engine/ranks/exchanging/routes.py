"""Which rows go from which rank to which, and how many bytes that is. Each rank works it out for itself."""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from engine.ranks.placement import Placement, Share

NUMBERS_OF_A_ROW = 8
"""What a row's target and id are sent as: four digits to the base 256 each."""

Counts = NDArray[np.int64]


@dataclass(frozen=True)
class Widths:
    """How many numbers ranks show each other of a row."""

    near: tuple[int, ...]
    """Those of each group, to ranks that see the row too, and"""
    wide: tuple[int, ...]
    """to all ranks."""
    labels: int = 0
    """Ranks of a group to each other, beside these."""

    @classmethod
    def of(cls, placement: Placement, widths: Mapping[int, int], everywhere: Mapping[int, int] | None = None) -> Widths:
        """From what each peer shows, to those who see its rows and everywhere."""
        wide = everywhere or {}
        near, far = (
            tuple(sum(of.get(k, 0) for k in group.peers) for group in placement.groups) for of in (widths, wide)
        )
        return cls(near, far, NUMBERS_OF_A_ROW if everywhere else 0)


@dataclass(frozen=True)
class Route:
    """What one rank sends and gets of a micro-batch whose rows are cut unevenly.

    A rank of another group gets those of this rank's rows that it sees as well; where signals are wanted everywhere,
    all ranks, this one among them, get all of this rank's rows of these.
    """

    ranks: Sequence[int]
    """That exchange, this one among them, ascending."""
    groups: Counts
    """Of each of them."""
    starts: Counts
    """First of each one's rows of the micro-batch, and"""
    stops: Counts
    """the one after the last."""
    own: int
    """This rank's place in `ranks`."""

    @functools.cached_property
    def rows(self) -> list[range]:
        """Of the micro-batch, of each of `ranks`."""
        return list(map(range, self.starts.tolist(), self.stops.tolist()))

    @property
    def mine(self) -> range:
        """This rank's rows."""
        return range(int(self.starts[self.own]), int(self.stops[self.own]))

    @functools.cached_property
    def common(self) -> list[range]:
        """The rows that this rank has in common with each; none with ranks of its own group."""
        starts = np.maximum(self.starts, self.starts[self.own])
        return list(map(range, starts.tolist(), (starts + self.shared).tolist()))

    @functools.cached_property
    def shared(self) -> Counts:
        """How many rows that is."""
        own = self.own
        found = np.minimum(self.stops, self.stops[own]) - np.maximum(self.starts, self.starts[own])
        return np.where(self.groups == self.groups[own], 0, np.maximum(found, 0))

    def sizes(self, widths: Widths) -> tuple[Counts, Counts]:
        """How many numbers this rank sends to each, and gets from each."""
        group, n = int(self.groups[self.own]), len(self.mine)
        extra = np.where(self.groups == group, widths.labels, 0)
        out = self.shared * widths.near[group] + n * (widths.wide[group] + extra)
        near, wide = (np.array(of, dtype=np.int64)[self.groups] for of in (widths.near, widths.wide))
        return out, self.shared * near + (self.stops - self.starts) * (wide + extra)


def route(placement: Placement, share: Share, *, everywhere: bool) -> Route:
    """The route of a rank's share, in its component or, where signals are wanted everywhere, in the world."""
    parts = 1 if everywhere else placement.components
    part = placement.replica * parts // placement.replicas
    units = share.batch // share.unit
    ranks, groups, replicas, counts = [], [], [], []
    for g, group in enumerate(placement.groups):
        count = len(group.ranks)
        places = range(part * count // parts, (part + 1) * count // parts)
        ranks.append(np.array(group.ranks[places.start : places.stop], dtype=np.int64))
        replicas.append(np.array(places, dtype=np.int64))
        groups.append(np.full(len(places), g))
        counts.append(np.full(len(places), count))
    everyone = np.concatenate(ranks)
    order = np.argsort(everyone)
    j, of = np.concatenate(replicas)[order], np.concatenate(counts)[order]
    # As `interval` has it.
    starts, stops = (at * units // of * share.unit for at in (j, j + 1))
    own = int(np.searchsorted(everyone[order], placement.rank))
    return Route(everyone[order].tolist(), np.concatenate(groups)[order], starts, stops, own)


def gathers(placement: Placement, share: Share | None, *, everywhere: bool) -> bool:
    """Whether an all-gather does: the ranks that exchange have as many rows each. Otherwise it is an all-to-all."""
    if not placement.is_even or share is None or not everywhere:
        return placement.is_even
    return share.batch // share.unit % placement.replicas == 0

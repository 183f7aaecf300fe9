"""Which rows go from which rank to which, and how many bytes that is. Each rank works it out for itself."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch

from engine.ranks.placement import Placement, Share, interval

NUMBERS_OF_A_ROW = 8
"""What a row's target and id are sent as: four digits to the base 256 each."""


@dataclass(frozen=True)
class Route:
    """What one rank sends and gets of a micro-batch whose rows are cut unevenly.

    A rank of another group gets those of this rank's rows that it sees as well; where signals are wanted everywhere,
    all ranks, this one among them, get all of this rank's rows of these.
    """

    ranks: Sequence[int]
    """That exchange, this one among them, ascending."""
    groups: Sequence[int]
    """Of each of them."""
    rows: Sequence[range]
    """Of the micro-batch, of each of them."""
    own: int
    """This rank's place in `ranks`."""

    @property
    def mine(self) -> range:
        """This rank's rows."""
        return self.rows[self.own]

    @property
    def common(self) -> list[range]:
        """The rows that this rank has in common with each; none with ranks of its own group."""
        mine, group = self.mine, self.groups[self.own]
        return [overlap(mine, rows) if g != group else range(0) for g, rows in zip(self.groups, self.rows, strict=True)]

    def sizes(self, near: Sequence[int], wide: Sequence[int], labels: int) -> tuple[list[int], list[int]]:
        """How many numbers this rank sends to each, and gets from each.

        Args:
            near: numbers that each group shows of a row, to those that see it too.
            wide: numbers that each group shows of a row everywhere.
            labels: numbers of a row that ranks of a group show each other beside these.
        """
        group, n = self.groups[self.own], len(self.mine)
        out, back = [], []
        for g, rows, common in zip(self.groups, self.rows, self.common, strict=True):
            extra = labels * (g == group)
            out.append(len(common) * near[group] + n * (wide[group] + extra))
            back.append(len(common) * near[g] + len(rows) * (wide[g] + extra))
        return out, back


def route(placement: Placement, share: Share, *, everywhere: bool) -> Route:
    """The route of a rank's share, in its component or, where signals are wanted everywhere, in the world."""
    ranks = range(placement.world) if everywhere else placement.exchange_ranks
    places = [placement.of(rank) for rank in ranks]
    groups = [place.group for place in places]
    rows = [
        interval(share.batch, share.unit, place.replica, len(placement.groups[g].ranks))
        for place, g in zip(places, groups, strict=True)
    ]
    return Route(ranks, groups, rows, ranks.index(placement.rank))


def gathers(placement: Placement, share: Share | None, *, everywhere: bool) -> bool:
    """Whether an all-gather does: the ranks that exchange have as many rows each. Otherwise it is an all-to-all."""
    if not placement.is_even or share is None or not everywhere:
        return placement.is_even
    return share.batch // share.unit % placement.replicas == 0


def overlap(one: range, other: range) -> range:
    """The rows that are in both."""
    start = max(one.start, other.start)
    return range(start, max(start, min(one.stop, other.stop)))


@dataclass(frozen=True)
class Traffic:
    """Bytes of one exchange of one rank, without what it keeps itself."""

    sent: int
    received: int


def traffic(
    placement: Placement,
    share: Share,
    widths: Mapping[int, int],
    everywhere: Mapping[int, int] | None = None,
    wire: torch.dtype = torch.float32,
) -> Traffic:
    """What this rank sends and gets in the exchange of one micro-batch.

    Args:
        placement: of the rank.
        share: its rows.
        widths: numbers that each peer shows of a row, those that go everywhere left out.
        everywhere: numbers that each peer shows of a row to all ranks; None where nothing goes everywhere.
        wire: format under way.
    """
    wide_of, labels = everywhere or {}, NUMBERS_OF_A_ROW if everywhere else 0
    near = [sum(widths.get(k, 0) for k in group.peers) for group in placement.groups]
    wide = [sum(wide_of.get(k, 0) for k in group.peers) for group in placement.groups]
    if gathers(placement, share, everywhere=bool(everywhere)):
        others = (placement.world if everywhere else len(placement.groups)) - 1
        if len(placement.groups) == 1:
            near = [0]
        longest = len(share.rows) * max(a + b + labels for a, b in zip(near, wide, strict=True))
        return Traffic(others * longest * wire.itemsize, others * longest * wire.itemsize)
    way = route(placement, share, everywhere=bool(everywhere))
    out, back = way.sizes(near, wide, labels)
    return Traffic(*((sum(sizes) - sizes[way.own]) * wire.itemsize for sizes in (out, back)))

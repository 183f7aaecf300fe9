"""How many bytes the exchange of a step brings to whom: what it does itself, counted."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch

from engine.ranks.exchanging.hierarchy import Hierarchy, hierarchy
from engine.ranks.exchanging.routes import Counts, Route, Widths, gathers, route
from engine.ranks.placement import Placement, Share


@dataclass(frozen=True)
class Traffic:
    """Bytes of one exchange of one rank, without what it keeps itself."""

    sent: int
    received: int
    across: int = 0
    """Of what is received, what comes from other nodes."""
    messages: int = 0
    """That come, of any size, and"""
    messages_across: int = 0
    """of these, from other nodes."""


def traffic(
    placement: Placement,
    share: Share,
    widths: Mapping[int, int],
    everywhere: Mapping[int, int] | None = None,
    wire: torch.dtype = torch.float32,
    *,
    hierarchical: bool = False,
) -> Traffic:
    """What this rank sends and gets in the exchange of one micro-batch.

    Args:
        placement: of the rank.
        share: its rows.
        widths: numbers that each peer shows of a row, those that go everywhere left out.
        everywhere: numbers that each peer shows of a row to all ranks; None where nothing goes everywhere.
        wire: format under way.
        hierarchical: in two levels, where there are two and it is an all-to-all.
    """
    shown = Widths.of(placement, widths, everywhere)
    if gathers(placement, share, everywhere=bool(everywhere)):
        return _gathered(placement, share, shown, wire.itemsize, everywhere=bool(everywhere))
    way = route(placement, share, everywhere=bool(everywhere))
    return _of_route(way, placement, shown, wire.itemsize, hierarchical=hierarchical)[way.own]


def traffic_of_all(
    placement: Placement,
    shares: Sequence[Share],
    widths: Mapping[int, int],
    everywhere: Mapping[int, int] | None = None,
    itemsize: int = 4,
    *,
    hierarchical: bool = False,
) -> list[Traffic]:
    """`traffic` of every rank of the world, whose rows of a micro-batch these are; of numbers of so many bytes."""
    shown = Widths.of(placement, widths, everywhere)
    found: dict[int, Traffic] = {}
    for rank in range(placement.world):
        if rank in found:
            continue
        place, share = placement.of(rank), shares[rank]
        if gathers(place, share, everywhere=bool(everywhere)):
            found[rank] = _gathered(place, share, shown, itemsize, everywhere=bool(everywhere))
            continue
        way = route(place, share, everywhere=bool(everywhere))
        each = _of_route(way, placement, shown, itemsize, hierarchical=hierarchical)
        found |= dict(zip(way.ranks, each, strict=True))
    return [found[rank] for rank in range(placement.world)]


def _gathered(placement: Placement, share: Share, widths: Widths, itemsize: int, *, everywhere: bool) -> Traffic:
    """Round a ring in the order of ranks: each passes on what the one before it has passed on."""
    ranks = range(placement.world) if everywhere else placement.exchange_ranks
    near = [0] if len(placement.groups) == 1 else widths.near
    longest = len(share.rows) * max(a + b + widths.labels for a, b in zip(near, widths.wide, strict=True))
    others = len(ranks) - 1
    size = others * longest * itemsize
    before = ranks[ranks.index(placement.rank) - 1]
    crosses = placement.node(before) != placement.node(placement.rank)
    return Traffic(size, size, crosses * size, others, crosses * others)


def _of_route(way: Route, placement: Placement, widths: Widths, itemsize: int, *, hierarchical: bool) -> list[Traffic]:
    nodes = placement.nodes(way.ranks)
    if hierarchical and (levels := hierarchy(way, nodes)) is not None:
        return in_two_levels(levels, widths, itemsize)
    return in_one_level(way, nodes, widths, itemsize)


def _segments(way: Route) -> tuple[Counts, Counts]:
    """The rows between any two ends of a rank's rows: how many, [S], and which rank of each group has them, [P, S]."""
    cuts = np.unique(way.starts)
    lengths = np.diff(np.append(cuts, way.stops.max()))
    cuts, lengths = cuts[lengths > 0], lengths[lengths > 0]
    owners = []
    for group in range(int(way.groups.max()) + 1):
        members = np.flatnonzero(way.groups == group)
        owners.append(members[np.searchsorted(way.starts[members], cuts, side="right") - 1])
    return lengths, np.array(owners)


def _sum(places: Counts, sizes: Counts, count: int) -> Counts:
    """Sizes added up place by place."""
    found = np.zeros(count, np.int64)
    np.add.at(found, places, sizes)
    return found


def _pairs(senders: Counts, receivers: Counts, count: int) -> Counts:
    """From how many others each gets something."""
    apart = senders != receivers
    pairs = np.unique(senders[apart] * count + receivers[apart])
    return _sum(pairs % count, np.ones_like(pairs), count)


def _columns(itemsize: int, *columns: Counts) -> list[Traffic]:
    sent, received, across, messages, messages_across = columns
    sizes = (sent * itemsize, received * itemsize, across * itemsize, messages, messages_across)
    return [Traffic(*each) for each in zip(*(column.tolist() for column in sizes), strict=True)]


def in_one_level(way: Route, nodes: Counts, widths: Widths, itemsize: int) -> list[Traffic]:
    """Of an all-to-all, for each of its ranks, whose nodes these are."""
    count, groups = len(nodes), way.groups
    near = _Near.of(way, widths)
    senders, receivers, sizes = near.senders, near.receivers, near.sizes
    crosses = nodes[senders] != nodes[receivers]
    sent, received = _sum(senders, sizes, count), _sum(receivers, sizes, count)
    across = _sum(receivers[crosses], sizes[crosses], count)
    messages = _pairs(senders, receivers, count)
    from_nodes = _pairs(senders[crosses], receivers[crosses], count)
    rows = way.stops - way.starts
    # What goes everywhere, and what goes to the ranks of a group.
    for kin, each in (
        (np.zeros_like(groups), rows * np.array(widths.wide)[groups]),
        (groups, rows * widths.labels),
    ):
        nodes_of_kin = np.unique(nodes, return_inverse=True)[1].reshape(-1) * (groups.max() + 1) + kin
        whole, there = _sum(kin, each, count)[kin], _sum(nodes_of_kin, each, int(nodes_of_kin.max()) + 1)[nodes_of_kin]
        members = np.bincount(kin)[kin]
        sent, received, across = sent + each * (members - 1), received + whole - each, across + whole - there
    if any(widths.wide):
        some = rows > 0
        messages = some.sum() - some
        from_nodes = some.sum() - _sum(nodes - nodes.min(), some.astype(np.int64), count)[nodes - nodes.min()]
    return _columns(itemsize, sent, received, across, messages, from_nodes)


@dataclass(frozen=True)
class _Near:
    """What goes to those who see a row too: of each segment, from each rank that has it to each other."""

    segments: Counts
    senders: Counts
    receivers: Counts
    sizes: Counts
    """How many numbers."""

    @classmethod
    def of(cls, way: Route, widths: Widths) -> _Near:
        """That of all ranks of an exchange."""
        lengths, owners = _segments(way)
        count, total = owners.shape
        g, h = (x.reshape(-1, 1) for x in np.nonzero(~np.eye(count, dtype=bool)))
        segments = np.tile(np.arange(total), (len(g), 1))
        sizes = lengths * np.array(widths.near, dtype=np.int64)[g]
        some = sizes > 0
        return cls(segments[some], owners[g, segments][some], owners[h, segments][some], sizes[some])


def in_two_levels(levels: Hierarchy, widths: Widths, itemsize: int) -> list[Traffic]:
    """Of one in two levels, both together, for each of its ranks."""
    way, nodes, count = levels.way, levels.nodes, len(levels.nodes)
    groups, rows, carriers = way.groups, way.stops - way.starts, levels.all_carriers()
    near = _Near.of(way, widths)
    senders, receivers, sizes = near.senders, near.receivers, near.sizes
    through = carriers[nodes[receivers], senders]
    stays = through == receivers
    inside, sent = (_sum(at[~stays], sizes[~stays], count) for at in (receivers, through))
    messages = _pairs(through, receivers, count)
    # Each segment goes to a node once, however many there see it.
    keys = (near.segments * count + senders) * levels.count + nodes[receivers]
    first = np.unique(keys, return_index=True)[1]
    first = first[nodes[senders[first]] != nodes[receivers[first]]]
    across = _sum(through[first], sizes[first], count)
    sent += _sum(senders[first], sizes[first], count)
    from_nodes = _pairs(senders[first], through[first], count)
    if any(widths.wide):
        everywhere, labels = rows * np.array(widths.wide)[groups], rows * widths.labels
        others = np.arange(levels.count)[:, None] != nodes
        kin = levels.kin
        each = (everywhere + labels * (kin[:, groups] > 0)) * others
        across += _sum(carriers.reshape(-1), each.reshape(-1), count)
        sent += each.sum(0)
        carried = _sum(carriers.reshape(-1), np.tile(everywhere, levels.count), count)
        of_groups = np.zeros((count, kin.shape[1]), np.int64)
        np.add.at(of_groups, (carriers.reshape(-1), np.tile(groups, levels.count)), np.tile(labels, levels.count))
        own = of_groups[np.arange(count), groups]
        inside += everywhere.sum() - carried + _sum(groups, labels, count)[groups] - own
        sent += carried * (kin.sum(1)[nodes] - 1) + (of_groups * kin[nodes]).sum(1) - own
        messages = kin.sum(1)[nodes] - 1
        from_nodes = _sum(carriers[others], (np.tile(rows, (levels.count, 1)) > 0)[others].astype(np.int64), count)
    return _columns(itemsize, sent, across + inside, across, messages + from_nodes, from_nodes)

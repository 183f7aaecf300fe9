"""An all-to-all in two levels: a row goes to a node once, to one of its ranks, which passes it on within the node."""

from __future__ import annotations

import functools
from dataclasses import dataclass, field, replace

import numpy as np

from engine.ranks.exchanging.routes import Counts, Route, Widths


@dataclass(frozen=True)
class Hierarchy:
    """Who sends what in each of the two. Ranks are named by their places in `way.ranks`.

    The l-th rank of a node sends to the l-th of each other node what anyone there needs of its rows, so that the ranks
    of a node have as much of it each. Within a node each rank sends on what it got so, and what is its own.
    """

    way: Route
    """The same in one level, as any of the ranks has it."""
    nodes: Counts
    """Of each of the ranks: 0, 1, ..."""
    _seen: dict[int, Route] = field(default_factory=dict, compare=False)
    _reach: dict[int, dict[int, list[range]]] = field(default_factory=dict, compare=False)
    _carriers: dict[int, Counts] = field(default_factory=dict, compare=False)

    @property
    def count(self) -> int:
        """Of nodes."""
        return len(self._members)

    @functools.cached_property
    def _members(self) -> list[Counts]:
        """Of each node, ascending."""
        return [np.flatnonzero(self.nodes == node) for node in range(int(self.nodes.max()) + 1)]

    @functools.cached_property
    def _local(self) -> Counts:
        """Which of its node each rank is."""
        found = np.zeros(len(self.nodes), np.int64)
        for members in self._members:
            found[members] = np.arange(len(members))
        return found

    @functools.cached_property
    def kin(self) -> Counts:
        """How many ranks of each group there are on each node, [nodes, groups]."""
        found = np.zeros((self.count, int(self.way.groups.max()) + 1), np.int64)
        np.add.at(found, (self.nodes, self.way.groups), 1)
        return found

    def here(self, place: int) -> list[int]:
        """The ranks of a rank's node, itself included."""
        members: list[int] = self._members[self.nodes[place]].tolist()
        return members

    def seen(self, place: int) -> Route:
        """The route of a rank."""
        if place not in self._seen:
            self._seen[place] = replace(self.way, own=place)
        return self._seen[place]

    def carriers(self, node: int) -> Counts:
        """Which rank of a node passes on there what each rank has for it: for one of the node, itself."""
        if node not in self._carriers:
            members = self._members[node]
            self._carriers[node] = np.where(
                self.nodes == node, np.arange(len(self.nodes)), members[self._local % len(members)]
            )
        return self._carriers[node]

    def all_carriers(self) -> Counts:
        """`carriers` of each node, [nodes, ranks]."""
        return np.stack([self.carriers(node) for node in range(self.count)])

    def carried(self, place: int) -> list[int]:
        """Whose rows a rank passes on within its node, ascending: its own, and those that it takes from others."""
        found: list[int] = np.flatnonzero(self.carriers(int(self.nodes[place])) == place).tolist()
        return found

    def reach(self, source: int) -> dict[int, list[range]]:
        """The rows of a rank that ranks of other groups see, node by node, ascending and apart."""
        if source not in self._reach:
            way = self.seen(source)
            places = np.flatnonzero(way.shared)
            starts = np.maximum(way.starts[places], way.starts[source])
            stops, nodes = starts + way.shared[places], self.nodes[places]
            found: dict[int, list[range]] = {}
            for at in np.lexsort((starts, nodes)).tolist():
                rows, start, stop = found.setdefault(int(nodes[at]), []), int(starts[at]), int(stops[at])
                if rows and start <= rows[-1].stop:
                    rows[-1] = range(rows[-1].start, max(stop, rows[-1].stop))
                else:
                    rows.append(range(start, stop))
            self._reach[source] = found
        return self._reach[source]

    def has_kin(self, source: int, node: int) -> bool:
        """Whether a rank of the same group is on a node."""
        return bool(self.kin[node, self.way.groups[source]])

    def to_nodes(self, source: int, widths: Widths) -> Counts:
        """How many numbers of a rank's rows each node needs; its own node is left out."""
        way = self.seen(source)
        group = int(way.groups[source])
        found = len(way.mine) * (widths.wide[group] + widths.labels * (self.kin[:, group] > 0))
        for node, rows in self.reach(source).items():
            found[node] += sum(map(len, rows)) * widths.near[group]
        found[self.nodes[source]] = 0
        return found

    def across(self, place: int, widths: Widths) -> tuple[Counts, Counts]:
        """How many numbers a rank sends between nodes to each, and gets from each."""
        out, back = (np.zeros(len(self.nodes), np.int64) for _ in range(2))
        node = int(self.nodes[place])
        for other, size in enumerate(self.to_nodes(place, widths).tolist()):
            if other != node:
                out[self.carriers(other)[place]] += size
        for source in self.carried(place):
            back[source] = self.to_nodes(source, widths)[node]
        return out, back

    def within(self, place: int, widths: Widths) -> tuple[list[int], list[int]]:
        """How many numbers a rank sends to each rank of its node, itself included, and gets from each."""
        own, got, here = self.carried(place), self.seen(place).sizes(widths)[1], self.here(place)
        out = [int(self.seen(other).sizes(widths)[1][own].sum()) for other in here]
        return out, [int(got[self.carried(other)].sum()) for other in here]

    def order(self, place: int) -> list[int]:
        """Whose rows a rank gets within its node, one after another."""
        return [source for other in self.here(place) for source in self.carried(other)]


def hierarchy(way: Route, nodes: Counts) -> Hierarchy | None:
    """None where that would be the same as one level: on one node, or with one rank on each."""
    found, places = np.unique(nodes, return_inverse=True)
    return Hierarchy(way, places.reshape(-1)) if 1 < len(found) < len(nodes) else None

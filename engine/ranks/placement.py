"""Who computes what: which rank holds which peers, on which rows of the global batch."""

from __future__ import annotations

import bisect
import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np
from numpy.typing import NDArray

Order = Literal["contiguous", "interleaved"]


@dataclass(frozen=True)
class Group:
    """Ranks that hold the same peers: they average their gradients, and share the rows of a batch between them."""

    peers: Sequence[int]
    """Ascending."""
    ranks: Sequence[int]
    """Ascending; the j-th of R computes the j-th of R parts of the rows, see `interval`."""


@dataclass(frozen=True)
class Share:
    """What one rank computes of one micro-batch."""

    rows: range
    """Of the global batch."""
    batch: int
    """Rows of the micro-batch, over all ranks of a group."""
    unit: int = 1
    """Neighbouring rows that no rank parts."""


@dataclass(frozen=True)
class Placement:
    """One rank's place among groups of ranks. Every peer is in one group, and every rank too.

    Every group computes all rows. Where all groups have as many ranks, ranks with the same `replica` see the same rows:
    the placement is even. Otherwise ranks see rows that overlap.

    Any rank's place is known on all of them, see `of`.

    Where peers are jobs of their own, this is a place in one of them: all its ranks are one group, of the peer `only`.
    """

    num_peers: int
    groups: tuple[Group, ...]
    rank: int
    only: int | None = None
    per_node: int | None = None
    """Ranks of each node, in their order, as far as this rank knows; None where that does not matter."""
    order: Order = "contiguous"
    """See `arranged`."""

    @classmethod
    def even(
        cls,
        num_peers: int,
        peers_per_rank: int,
        world: int,
        rank: int,
        only: int | None = None,
        order: Order = "contiguous",
    ) -> Placement:
        """Peers dealt in order to groups of as many ranks, `peers_per_rank` to each; both must divide."""
        peers = range(num_peers) if only is None else range(only, only + 1)
        count = len(peers) // peers_per_rank
        held = [peers[g * peers_per_rank : (g + 1) * peers_per_rank] for g in range(count)]
        ranks = arranged([world // count] * count, order)
        return cls(num_peers, tuple(Group(*each) for each in zip(held, ranks, strict=True)), rank, only, order=order)

    def of(self, rank: int) -> Placement:
        """The same as another rank has it."""
        return replace(self, rank=rank)

    @property
    def peers(self) -> range:
        """The peers that live in this job: all K, or one."""
        return range(self.num_peers) if self.only is None else range(self.only, self.only + 1)

    @property
    def world(self) -> int:
        """W, the number of ranks."""
        return sum(len(group.ranks) for group in self.groups)

    @property
    def group(self) -> int:
        """Which of the groups this rank is in."""
        return next(g for g, group in enumerate(self.groups) if _place(group.ranks, self.rank) is not None)

    @property
    def replica_ranks(self) -> Sequence[int]:
        """The ranks that hold this rank's peers, and average their gradients, this one among them."""
        return self.groups[self.group].ranks

    @property
    def replicas(self) -> int:
        """R, the number of ranks that share the rows of a batch with this one, itself included."""
        return len(self.replica_ranks)

    @property
    def replica(self) -> int:
        """Which share of the rows this rank computes."""
        place = _place(self.replica_ranks, self.rank)
        assert place is not None
        return place

    @property
    def mean_replicas(self) -> float:
        """D = W / P, the ranks of a group in the mean over groups; R where the placement is even."""
        return self.world / len(self.groups)

    @property
    def residents(self) -> Sequence[int]:
        """The peers that live on this rank."""
        return self.groups[self.group].peers

    @property
    def is_even(self) -> bool:
        """Whether all groups have as many ranks, so that ranks see the same rows or none in common."""
        return len({len(group.ranks) for group in self.groups}) == 1

    @property
    def kind(self) -> str:
        """colocated, spread, hybrid, balanced or jobs."""
        if self.only is not None:
            return "jobs"
        if len(self.groups) == 1:
            return "colocated"
        peers = {len(group.peers) for group in self.groups}
        if not self.is_even or len(peers) > 1:
            return "balanced"
        return "spread" if peers == {1} else "hybrid"

    @property
    def components(self) -> int:
        """In how many parts the ranks fall that have no rows in common; parts are alike, and have ranks of each group.

        The greatest common divisor of the groups' numbers of ranks: there, and nowhere else, the intervals of all
        groups end together."""
        return math.gcd(*(len(group.ranks) for group in self.groups))

    @property
    def exchange_ranks(self) -> Sequence[int]:
        """The ranks that this rank exchanges signals with, itself included, ascending: those of its component. Where
        the placement is even they see the same rows, and are one of each group."""
        count = self.components
        part = self.replica * count // self.replicas
        found: list[int] = []
        for group in self.groups:
            size = len(group.ranks) // count
            found += group.ranks[part * size : (part + 1) * size]
        return sorted(found)

    def node(self, rank: int) -> int:
        """Which node a rank is on."""
        return rank // (self.per_node or self.world)

    def nodes(self, ranks: Sequence[int]) -> NDArray[np.int64]:
        """The node of each of some ranks."""
        return np.asarray(ranks, dtype=np.int64) // (self.per_node or self.world)

    def cut(self, batch: int, parts: int = 1, unit: int = 1) -> tuple[Share, ...]:
        """This rank's rows of a global batch, micro-batch by micro-batch.

        The global batch is cut into micro-batches, and each of these among the ranks of a group, so that all ranks are
        at rows of the same part at a time. Where the placement is even and everything divides, the ranks' shares come
        first, and micro-batches are cut from these, which is the same for ranks that exchange.

        Args:
            batch: rows of the global batch.
            parts: micro-batches.
            unit: neighbouring rows that are never parted; divides `batch`.
        """
        units, replicas = batch // unit, self.replicas
        if self.is_even and units % (replicas * parts) == 0:
            first, size = self.replica * batch // replicas, batch // replicas // parts
            return tuple(
                Share(range(first + m * size, first + (m + 1) * size), batch // parts, unit) for m in range(parts)
            )
        shares = []
        for m in range(parts):
            micro = interval(batch, unit, m, parts)
            mine = interval(len(micro), unit, self.replica, replicas)
            shares.append(Share(range(micro.start + mine.start, micro.start + mine.stop), len(micro), unit))
        return tuple(shares)

    def rows(self, batch: int, parts: int = 1, unit: int = 1) -> slice | NDArray[np.int64]:
        """The rows of `cut`, one micro-batch after another: a slice, or their numbers where there are gaps."""
        ranges = [share.rows for share in self.cut(batch, parts, unit)]
        if all(one.stop == other.start for one, other in itertools.pairwise(ranges)):
            return slice(ranges[0].start, ranges[-1].stop)
        return np.concatenate([np.arange(rows.start, rows.stop, dtype=np.int64) for rows in ranges])

    def least_rows(self, batch: int, parts: int = 1, unit: int = 1) -> int:
        """The rows of the smallest micro-batch of any rank, where the rows are cut by `cut`."""
        most = max(len(group.ranks) for group in self.groups)
        return batch // unit // parts // most * unit

    def __str__(self) -> str:
        kind, ranks = self.kind, f"{self.replicas} rank{'s' * (self.replicas > 1)} a peer, {self.world} in all"
        if kind == "balanced":
            return f"balanced: {', '.join(map(_of_group, self.groups))}, {self.world} in all"
        if self.only is not None:
            return f"{kind}: one of {self.num_peers} peers in this one, {ranks}"
        if len(self.groups) == 1:
            return f"{kind}: all peers on every rank, {ranks}"
        return f"{kind}: {len(self.residents)} of {self.num_peers} peers a rank, {ranks}"


def interval(batch: int, unit: int, index: int, parts: int) -> range:
    """Rows `index` of `parts`, as even as they can be in whole units: floor(j U / R) .. floor((j + 1) U / R) units."""
    units = batch // unit
    return range(index * units // parts * unit, (index + 1) * units // parts * unit)


def arranged(counts: Sequence[int], order: Order, per_node: int | None = None) -> list[Sequence[int]]:
    """The ranks of each group, of so many ranks each, ascending.

    Args:
        counts: ranks of each group.
        order: `contiguous`: those of a group one after another; on nodes of `per_node` ranks a group gets whole nodes
            first, where it is then on fewer. `interleaved`: those of all groups in turn, as evenly as may be.
        per_node: ranks of a node, which must divide their number.
    """
    world, ends = sum(counts), [sum(counts[: g + 1]) for g in range(len(counts))]
    if order == "interleaved":
        return _interleaved(counts)
    plain: list[Sequence[int]] = [range(end - count, end) for end, count in zip(ends, counts, strict=True)]
    if not per_node or world % per_node or per_node == world:
        return plain
    packed = _by_nodes(counts, per_node)
    return packed if _nodes(packed, per_node) < _nodes(plain, per_node) else plain


def _interleaved(counts: Sequence[int]) -> list[Sequence[int]]:
    if len(set(counts)) == 1:
        return [range(g, sum(counts), len(counts)) for g in range(len(counts))]
    found: list[list[int]] = [[] for _ in counts]
    for rank in range(sum(counts)):
        # Whoever is furthest behind its share of the ranks so far.
        g = max(range(len(counts)), key=lambda g: (counts[g] * (rank + 1) - sum(counts) * len(found[g]), -g))
        found[g].append(rank)
    return list(found)


def _by_nodes(counts: Sequence[int], per_node: int) -> list[Sequence[int]]:
    found: list[list[int]] = []
    begin = 0
    for count in counts:
        whole = count // per_node * per_node
        found.append([*range(begin, begin + whole)])
        begin += whole
    for g in sorted(range(len(counts)), key=lambda g: (-(counts[g] % per_node), g)):
        found[g] += range(begin, begin + counts[g] % per_node)
        begin += counts[g] % per_node
    return list(found)


def _nodes(groups: Sequence[Sequence[int]], per_node: int) -> int:
    """On how many nodes each group is, added up."""
    return sum(len({rank // per_node for rank in ranks}) for ranks in groups)


def _place(ranks: Sequence[int], rank: int) -> int | None:
    """Where a rank stands in an ascending sequence, if it does."""
    if isinstance(ranks, range):
        return ranks.index(rank) if rank in ranks else None
    at = bisect.bisect_left(ranks, rank)
    return at if at < len(ranks) and ranks[at] == rank else None


def _of_group(group: Group) -> str:
    peers = " and ".join(str(k) for k in group.peers)
    return f"peer{'s' * (len(group.peers) > 1)} {peers} on {len(group.ranks)} rank{'s' * (len(group.ranks) > 1)}"

"""Who computes what, for every rank of worlds of any size, in one process."""

from __future__ import annotations

import itertools
import random
from collections import Counter

import numpy as np
import pytest

from engine.ranks.placement import Placement, arranged, interval
from engine.ranks.planning.choosing import balanced, peers_of_ranks, ranks_of_peers


def _places(placement: Placement) -> list[Placement]:
    return [placement.of(rank) for rank in range(placement.world)]


WORLDS = {
    "one rank": Placement.even(3, 3, 1, 0),
    "spread": Placement.even(4, 1, 8, 0),
    "hybrid, in turn": Placement.even(4, 2, 6, 0, order="interleaved"),
    "2 and 6": balanced([1, 3], 8, 0),
    "2 and 6, in turn": balanced([1, 3], 8, 0, order="interleaved"),
    "5, 1 and 1": balanced([1, 9, 1], 7, 0, [5, 1, 1], order="contiguous"),
    "4 peers on 3 ranks": balanced([5, 1, 3, 1], 3, 0),
    "by nodes": balanced([1, 1, 1], 16, 0, [3, 8, 5], order="contiguous", per_node=4),
}


@pytest.mark.parametrize("placement", WORLDS.values(), ids=WORLDS)
@pytest.mark.parametrize(("batch", "parts", "unit"), [(24, 1, 1), (29, 1, 1), (36, 3, 1), (56, 2, 2), (17, 2, 1)])
def test_every_row_of_every_peer_is_computed_once(placement: Placement, batch: int, parts: int, unit: int) -> None:
    places = _places(placement)
    rows = {
        (k, row)
        for place in places
        for k in place.residents
        for share in place.cut(batch, parts, unit)
        for row in share.rows
    }
    count = sum(len(s.rows) * len(place.residents) for place in places for s in place.cut(batch, parts, unit))
    assert len(rows) == count == batch * placement.num_peers
    for place in places:
        shares = place.cut(batch, parts, unit)
        assert sum(share.batch for share in shares) == batch
        assert all(share.rows.start % unit == share.rows.stop % unit == 0 for share in shares)
        picked = np.arange(batch)[place.rows(batch, parts, unit)]
        assert picked.tolist() == [row for share in shares for row in share.rows]
        assert min(len(share.rows) for share in shares) >= placement.least_rows(batch, parts, unit)


@pytest.mark.parametrize("placement", WORLDS.values(), ids=WORLDS)
def test_every_rank_has_its_place(placement: Placement) -> None:
    assert sorted(rank for group in placement.groups for rank in group.ranks) == [*range(placement.world)]
    assert sorted(k for group in placement.groups for k in group.peers) == [*range(placement.num_peers)]
    for place in _places(placement):
        assert place.groups[place.group].ranks[place.replica] == place.rank
        # Ranks that have a row in common exchange with each other, and an exchange has all rows of all its peers once.
        mine = interval(1000, 1, place.replica, place.replicas)
        for other in _places(placement):
            theirs = interval(1000, 1, other.replica, other.replicas)
            meet = max(mine.start, theirs.start) < min(mine.stop, theirs.stop)
            assert not meet or other.rank in place.exchange_ranks
        rows = Counter(
            (other.group, row)
            for rank in place.exchange_ranks
            for other in [placement.of(rank)]
            for row in interval(1000, 1, other.replica, other.replicas)
        )
        assert len(rows) == 1000 // placement.components * len(placement.groups) or 1000 % placement.components
        assert set(rows.values()) == {1}


def test_even_placements_are_what_they_were() -> None:
    """The rectangle of groups and replicas, written down again."""
    for peers, held, world in [(4, 2, 8), (3, 1, 3), (2, 2, 5), (4, 1, 12)]:
        groups = peers // held
        replicas = world // groups
        for rank in range(world):
            place = Placement.even(peers, held, world, rank)
            group, replica = divmod(rank, replicas)
            assert (place.group, place.replica, place.replicas) == (group, replica, replicas)
            assert [*place.residents] == [*range(group * held, (group + 1) * held)]
            assert [*place.replica_ranks] == [*range(group * replicas, (group + 1) * replicas)]
            assert [*place.exchange_ranks] == [*range(replica, world, replicas)]
            batch = 6 * replicas
            assert place.rows(batch) == slice(6 * replica, 6 * replica + 6)
            micro = [share.rows for share in place.cut(batch, 3)]
            assert micro == [range(6 * replica + 2 * m, 6 * replica + 2 * m + 2) for m in range(3)]


def test_ranks_in_proportion_to_costs() -> None:
    assert ranks_of_peers([1, 3], 8) == [2, 6]
    assert ranks_of_peers([1, 1000], 4) == [1, 3]
    assert ranks_of_peers([1, 1, 1], 4) == [2, 1, 1]
    # By trying all ways: nothing makes the slowest faster.
    draw = random.Random(1)
    for _ in range(50):
        costs = [draw.uniform(1, 9) for _ in range(3)]
        slowest = max(c / n for c, n in zip(costs, ranks_of_peers(costs, 9), strict=True))
        ways = [way for way in itertools.product(range(1, 8), repeat=3) if sum(way) == 9]
        assert slowest == min(max(c / n for c, n in zip(costs, way, strict=True)) for way in ways)


def test_peers_dealt_to_fewer_ranks() -> None:
    """The most costly first, each to the rank with the least: 5 | 3 | 1, then the last 1 beside the first."""
    assert peers_of_ranks([5, 1, 3, 1], 3) == [(0,), (1, 3), (2,)]
    assert peers_of_ranks([1, 1, 1, 1], 2) == [(0, 2), (1, 3)]


def test_whole_nodes_first() -> None:
    """16 ranks in nodes of 4. One after another, peer 1 would be on 3 nodes, 0 on 1 and 2 on 2."""
    assert [[*ranks] for ranks in arranged([3, 8, 5], "contiguous", 4)] == [
        [12, 13, 14],
        [0, 1, 2, 3, 4, 5, 6, 7],
        [8, 9, 10, 11, 15],
    ]
    assert arranged([2, 6], "contiguous", 4) == [range(2), range(2, 8)]
    assert [[*ranks] for ranks in arranged([2, 6], "interleaved")] == [[1, 5], [0, 2, 3, 4, 6, 7]]
    assert arranged([2, 2], "interleaved") == [range(0, 4, 2), range(1, 4, 2)]


def test_what_it_says_of_itself() -> None:
    assert str(balanced([1, 3], 8, 0)) == "balanced: peer 0 on 2 ranks, peer 1 on 6 ranks, 8 in all"
    assert str(balanced([5, 1, 3, 1], 3, 0)) == (
        "balanced: peer 0 on 1 rank, peers 1 and 3 on 1 rank, peer 2 on 1 rank, 3 in all"
    )
    assert str(Placement.even(4, 2, 4, 0)) == "hybrid: 2 of 4 peers a rank, 2 ranks a peer, 4 in all"

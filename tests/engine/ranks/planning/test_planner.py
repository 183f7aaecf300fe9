"""What is foretold of a placement, against what can be worked out by hand and what the exchange itself says."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from engine.ranks.exchanging.traffic import traffic, traffic_of_all
from engine.ranks.placement import Placement
from engine.ranks.planning.choosing import AUTO, automatic, balanced, candidates, plan
from engine.ranks.planning.costs import costs_of
from engine.ranks.planning.footprint import footprint_of
from engine.ranks.planning.hardware import GPUS
from engine.ranks.planning.planner import (
    Cluster,
    Load,
    PeerLoad,
    averaging,
    choose,
    distinct,
    exchanged,
    load_of,
    predict,
    short,
)
from tests.engine.stepping import config_of
from tests.marks import slow

H100 = GPUS["h100"]


def peers(*costs: float, gradients: int = 0) -> list[PeerLoad]:
    """Whose passes take `cost` seconds for each row, a third of it forward."""
    return [PeerLoad(f"p{k}", lambda n, c=c: (n * c / 3, 2 * n * c / 3), gradients) for k, c in enumerate(costs)]


def test_an_unequal_pair_is_foretold_as_by_hand() -> None:
    """Costs 3 and 1, 24 rows, 4 ranks. Spread: 12 rows each, 36 s and 12 s. Balanced: 8 rows of 3 s, 24 rows of 1 s."""
    load = Load(peers(3.0, 1.0), batch=24)
    cluster = Cluster(H100, 4)
    spread = predict(Placement.even(2, 1, 4, 0), load, cluster)
    assert (spread.step, spread.compute, spread.waiting) == pytest.approx((36, 24, 12))
    assert spread.efficiency == pytest.approx(2 / 3)
    even = predict(balanced([3.0, 1.0], 4, 0), load, cluster)
    assert [len(group.ranks) for group in even.placement.groups] == [3, 1]
    assert (even.step, even.waiting, even.efficiency) == pytest.approx((24, 0, 1))
    best, why = choose([spread, even])
    assert best is even
    assert why == (
        "a step takes 33% less than in spread, where ranks of the cheaper peers would wait for the others 33% of a step"
    )


def test_what_is_not_clearly_better_is_not_chosen() -> None:
    load = Load(peers(1.0, 1.0), batch=24)
    found = [predict(placement, load, Cluster(H100, 4)) for placement in candidates(load, 4)]
    best, why = choose(found)
    assert short(found[0].placement) == short(best.placement) == "spread"
    assert why == "colocated would take 0% longer"


def test_gradients_that_a_backward_pass_cannot_hide_are_counted() -> None:
    """450 GB/s x 0.8 = 360 GB/s; 4 ranks send 2 x 3/4 of 720 GB: 3 s; the pass backward of 2 s hides 1.8 s."""
    load = Load(peers(1.0, gradients=720 * 10**9), batch=12)
    found = predict(Placement.even(1, 1, 4, 0), load, Cluster(H100, 4))
    assert found.gradients == pytest.approx(3 - 0.9 * 2, abs=1e-3)
    assert found.step == pytest.approx(3 + 1.2, abs=1e-3)
    assert averaging(found.placement, load, Cluster(H100, 4)) == (2 * 3 * 720 * 10**9, 0)


def test_bytes_of_a_ring_within_nodes_and_between() -> None:
    """4 ranks on 2 nodes, one ring: of its 4 hops 2 are between nodes; each carries 2 x 3/4 of the gradients."""
    load = Load(peers(1.0, gradients=1000), batch=12)
    assert averaging(Placement.even(1, 1, 4, 0), load, Cluster(H100, 2)) == (3000, 3000)


CASES: list[tuple[Placement, int, int, int]] = [
    (Placement.even(2, 1, 4, 0), 24, 1, 1),
    (Placement.even(4, 2, 4, 0, None, "interleaved"), 24, 2, 1),
    (balanced([3.0, 1.0], 4, 0), 26, 1, 1),
    (balanced([5.0, 2.0, 1.0], 7, 0), 40, 2, 2),
    (balanced([1.0, 2.0, 3.0, 4.0], 3, 0), 24, 3, 1),
    (balanced([6.0, 2.0], 8, 0), 31, 1, 1),
]


@pytest.mark.parametrize("everywhere", [False, True])
@pytest.mark.parametrize("case", range(len(CASES)))
def test_bytes_are_those_of_the_exchange(case: int, everywhere: bool) -> None:
    placement, batch, parts, unit = CASES[case]
    count = placement.num_peers
    widths = {k: 10 + k for k in range(count)}
    wide = {k: 3 + k for k in range(count)} if everywhere else None
    load = Load(peers(*[1.0] * count), batch, parts, unit, shown=widths, everywhere=wide, wire=2)
    found = exchanged(placement, load, Cluster(H100, 2))
    expected, across = 0, 0
    for rank, micro in itertools.product(range(placement.world), range(parts)):
        place = replace(placement.of(rank), per_node=2)
        share = place.cut(batch, parts, unit)[micro]
        each = traffic(place, share, widths, wide, torch.bfloat16, hierarchical=found.hierarchical)
        expected, across = expected + each.received, across + each.across
    assert (found.inside, found.between) == (expected - across, across)
    one_node = exchanged(placement, load, Cluster(H100, placement.world))
    assert one_node.between == 0


@pytest.mark.parametrize("world", [1, 6, 256, slow(4096)])
def test_placements_of_thousands_of_ranks(world: int) -> None:
    """Every (row, peer) is computed exactly once, what a rank gets does not grow with the world, all is foretold."""
    costs, per_rank = (4.1, 1.8, 1.0), 64
    load = Load(peers(*costs, gradients=10**8), per_rank * world, shown=dict.fromkeys(range(3), 1000), decoded=6000.0)
    cluster = Cluster(H100, 8)
    found = candidates(load, world, per_node=8)
    assert found
    for placement in found:
        for group in placement.groups:
            shares = [placement.of(rank).cut(load.batch)[0].rows for rank in group.ranks]
            assert [row for rows in shares for row in (rows.start, rows.stop)] == _ends(shares, load.batch)
            assert max(map(len, shares)) - min(map(len, shares)) <= 1
        assert sorted(rank for group in placement.groups for rank in group.ranks) == list(range(world))
        assert sorted(k for group in placement.groups for k in group.peers) == [0, 1, 2]
        prediction = predict(placement, load, cluster)
        assert prediction.step > 0
        assert 0 < prediction.efficiency <= 1
        each = traffic_of_all(placement, [placement.of(r).cut(load.batch)[0] for r in range(world)], load.shown or {})
        most = max(got.received for got in each)
        # A rank gets its own rows of the two other peers and, where it is one of a few, no more than theirs.
        most_rows = max(len(placement.of(group.ranks[0]).cut(load.batch)[0].rows) for group in placement.groups)
        assert most <= (most_rows + 1) * 2 * 1000 * 4 * (1 + (placement.is_even and len(placement.groups) == 2))


def _ends(shares: Sequence[range], batch: int) -> list[int]:
    """Beginnings and ends of rows that follow each other from 0 to the last."""
    ends = [0, *(rows.stop for rows in shares)]
    assert ends[-1] == batch
    return [end for pair in itertools.pairwise(ends) for end in pair]


def test_rows_of_several_ranks_are_counted_once() -> None:
    assert distinct([range(4), range(2, 6), range(8, 9), range(3, 4)]) == 7


SMALL: dict[str, Any] = {"network": "cifar_resnet8_b", "options": {"width": 4}, "name": "a"}
WIDE: dict[str, Any] = {"network": "cifar_wrn_16_4", "name": "b"}


def test_operations_of_a_network_are_those_of_a_pass_forward() -> None:
    config = config_of({"name": "dml"}, [SMALL, WIDE])
    for cost, (_, peer) in zip(costs_of(config), config.cohort, strict=True):
        counted = footprint_of(config, peer, 10)
        assert 3 * counted.flops[: counted.forward].sum() == cost
        # The way back takes twice that, but for the images, which need no gradient.
        assert 1.8 * cost / 3 < counted.flops[counted.forward :].sum() < 2 * cost / 3


def test_a_frozen_peer_weighs_a_third(tmp_path: Path) -> None:
    """It goes forward only, one pass of three: of 4 ranks it gets 1 beside a peer like it, which gets 3."""
    frozen = {**SMALL, "frozen": True, "pretrained": str(tmp_path / "a.pt")}
    config = config_of({"name": "dml"}, [frozen, {**SMALL, "name": "b"}], placement={"kind": "balanced"})
    teacher, student = costs_of(config)
    assert student == 3 * teacher
    assert [len(group.ranks) for group in plan(config, 4, 0).groups] == [1, 3]
    counted = [footprint_of(config, peer, 10) for _, peer in config.cohort]
    assert counted[0].flops.sum() * 3 == pytest.approx(counted[1].flops.sum(), rel=0.1)


def test_auto_is_a_function_of_config_and_world() -> None:
    """Alike peers get fewest a rank, unequal ones what is clearly faster; and the same for each rank that asks."""
    alike = config_of({"name": "dml"}, 2)
    assert automatic(alike, 4) is None
    assert plan(alike, 4, 3).kind == "spread"
    batch = {"data": {"global_batch": 1024}, "precision": {"amp": "bf16"}}
    unequal = config_of({"name": "dml"}, [SMALL, {**WIDE, "network": "cifar_wrn_28_10"}], **batch)
    found = [plan(unequal, 8, rank) for rank in range(8)]
    assert {each.groups for each in found} == {found[0].groups}
    assert found[0].kind != "spread"
    chosen = automatic(unequal, 8)
    assert chosen is not None
    load = load_of(unequal, AUTO.gpu)
    assert predict(chosen[0], load, AUTO).step < 0.95 * predict(Placement.even(2, 1, 8, 0), load, AUTO).step


def test_given_ranks_are_proportions_where_the_launcher_may_start_anew(monkeypatch: pytest.MonkeyPatch) -> None:
    config = config_of({"name": "dml"}, [SMALL, WIDE], placement={"kind": "balanced", "ranks": {"a": 2, "b": 6}})
    monkeypatch.setenv("TORCHELASTIC_MAX_RESTARTS", "3")
    assert [len(group.ranks) for group in plan(config, 8, 0).groups] == [2, 6]
    assert [len(group.ranks) for group in plan(config, 4, 0).groups] == [1, 3]


def test_decoding_that_is_behind_is_counted() -> None:
    """24 rows, costs 1 and 1, spread over 4 ranks of a node, 12 rows and 12 s each; a rank decodes half a row a second.
    Apart, each decodes its 12 rows in 24 s. Together, 4 ranks decode 24 rows in 12 s, as long as the step takes."""
    for shared, late in ((False, 12.0), (True, 0.0)):
        load = Load(peers(1.0, 1.0), 24, decoded=0.5, shared_decode=shared)
        assert predict(Placement.even(2, 1, 4, 0), load, Cluster(H100, 4)).decode == pytest.approx(late)


def test_ranks_of_all_peers_on_each_node_decode_less() -> None:
    """Costs 3 and 1, 24 rows, 6 and 2 ranks on two nodes of 4: 12 s a rank. A rank decodes a row in 4 s. One after
    another, the second node sees all 24 rows, as it has both ranks of peer 1: 6 rows a rank, 24 s. Interleaved, 3 ranks
    and 1 of a node see 12 rows each, the same ones: 3 rows a rank, 12 s, as long as the step takes."""
    load, cluster = Load(peers(3.0, 1.0), 24, decoded=0.25), Cluster(H100, 4)
    found = {short(each): predict(each, load, cluster) for each in candidates(load, 8, per_node=4)}
    assert found["balanced (6:2)"].decode == pytest.approx(12)
    assert found["balanced (6:2), interleaved"].decode == pytest.approx(0)
    assert found["balanced (6:2), interleaved"].step == pytest.approx(12)

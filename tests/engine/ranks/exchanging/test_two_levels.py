"""An all-to-all in two levels: what comes is what one level brings, and a row crosses between two nodes once."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.distributed as dist

from engine.ranks.collectives import group_of
from engine.ranks.exchanging.exchange import Exchange
from engine.ranks.exchanging.hierarchy import Hierarchy, hierarchy
from engine.ranks.exchanging.routes import NUMBERS_OF_A_ROW, Route, Widths, route
from engine.ranks.exchanging.traffic import Traffic, in_one_level, in_two_levels, traffic
from engine.ranks.placement import Placement
from engine.ranks.planning.choosing import AUTO, balanced
from engine.ranks.planning.levels import judge_of
from tests.engine.ranks.exchanging.test_exchange import CLASS_IDS, FLOAT, IMAGE_IDS, Recorder
from tests.engine.ranks.exchanging.test_uneven_exchange import ROWS, assert_rows, value
from tests.marks import slow
from tests.worlds import run_world


def _placed(counts: list[int], per_node: int | None, order: str = "contiguous") -> Placement:
    placement = balanced([1.0] * len(counts), dist.get_world_size(), dist.get_rank(), counts, order=order)  # type: ignore[arg-type]
    return replace(placement, per_node=per_node)


def _shown(counts: list[int], per_node: int, everywhere: list[str], wire: torch.dtype, order: str) -> Any:
    placement = _placed(counts, per_node, order)
    exchange = Exchange(placement, group_of(placement.exchange_ranks), wire, judge_of("hierarchical", AUTO))
    [share] = placement.cut(ROWS)
    mine = torch.arange(ROWS)[share.rows.start : share.rows.stop]
    own = {k: {"logits": value(k, mine, 2 + k), "wide": value(k, mine, 3)} for k in placement.residents}
    labels = (CLASS_IDS[mine], IMAGE_IDS[mine]) if everywhere else None
    asked: dict[str, Any] = {"share": share, "everywhere": everywhere, "labels": labels}
    exchange(own, **asked)
    with Recorder() as recorder:
        found = exchange(own, **asked)
    wide = dict.fromkeys(range(len(counts)), 3) if everywhere else None
    near = {k: 2 + k + (0 if everywhere else 3) for k in range(len(counts))}
    told = [traffic(placement, share, near, wide, wire, hierarchical=two) for two in (True, False)]
    return mine, list(placement.residents), found, recorder.calls, *told


CASES = [([2, 1, 1], 2, "contiguous"), ([3, 1, 2], 3, "interleaved")]


@pytest.mark.parametrize("wire", [slow(torch.float32), torch.bfloat16])
@pytest.mark.parametrize("everywhere", [[], ["wide"]])
@pytest.mark.parametrize("case", [0, 1])
def test_each_rank_gets_what_one_level_brings(case: int, everywhere: list[str], wire: torch.dtype) -> None:
    counts, per_node, order = CASES[case]
    world = sum(counts)
    across = 0
    results = run_world(world, _shown, counts, per_node, everywhere, wire, order)
    for rank, (mine, residents, found, calls, two, _) in enumerate(results):
        assert_rows(found, mine, residents, everywhere, wire)
        node = tuple(range(rank // per_node * per_node, (rank // per_node + 1) * per_node))
        assert [(call.collective, call.ranks) for call in calls] == [
            ("alltoall_base", tuple(range(world))),
            ("alltoall_base", node),
        ]
        across += calls[0].size
        # What a rank keeps is no traffic: its own wide rows and labels, and what it was sent for itself.
        assert two.sent <= sum(call.size for call in calls)
    assert sum(two.across for *_, two, _ in results) < sum(one.across for *_, one in results)
    assert across == sum(two.across for *_, two, _ in results)
    assert sum(two.sent for *_, two, _ in results) == sum(two.received for *_, two, _ in results)


def test_what_crosses_by_hand() -> None:
    """Ranks 0 and 1 have peer 0, on one node; 2 and 3 have peers 1 and 2, on another. The 11 rows of peer 0 are seen by
    rank 2 and by rank 3: 22 rows cross in one level, 11 in two. Those of peers 1 and 2 cross once in any case, each to
    the one of ranks 0 and 1 that sees it. Peer k shows 5 + k numbers."""
    near = {0: 5, 1: 6, 2: 7}
    places = [replace(balanced([1] * 3, 4, rank, [2, 1, 1]), per_node=2) for rank in range(4)]
    one, two = (
        [traffic(place, place.cut(ROWS)[0], near, hierarchical=levels) for place in places] for levels in (False, True)
    )
    assert sum(got.across for got in one) == FLOAT * 11 * (2 * 5 + 6 + 7)
    assert sum(got.across for got in two) == FLOAT * 11 * (5 + 6 + 7)
    # Peer 1's rows go from rank 2 to rank 0 and peer 2's from rank 3 to rank 1, all of them; they are passed on.
    assert [got.across for got in two] == [FLOAT * 11 * 6, FLOAT * 11 * 7, FLOAT * 5 * 5, FLOAT * 6 * 5]
    # Rank 0 passes on peer 1's rows 5 to 10, and gets those of peer 2 from 0 to 4. Within the other node, rank 2 gets
    # rank 1's six rows of peer 0 from rank 3, and peer 2's eleven.
    assert two[0].sent == FLOAT * (5 * 5 + 6 * 6)
    assert two[0].received == FLOAT * (11 * 6 + 5 * 7)
    assert two[2].received == FLOAT * (5 * 5 + 6 * 5 + 11 * 7)
    assert [(got.messages, got.messages_across) for got in two] == [(2, 1)] * 4
    # With three numbers that go to all, and the labels, which go to ranks of the same peer alone: on node 0 they stay.
    wide = dict.fromkeys(range(3), 3)
    one, two = (
        [traffic(place, place.cut(ROWS)[0], near, wide, hierarchical=levels) for place in places]
        for levels in (False, True)
    )
    assert sum(got.across for got in one) == FLOAT * 11 * (2 * 5 + 6 + 7 + 3 * 2 * 3)
    assert sum(got.across for got in two) == FLOAT * 11 * (5 + 6 + 7 + 3 * 3)


def _by_parts(levels: Hierarchy, place: int, widths: Widths) -> Traffic:
    """From what a rank puts into its two collectives."""
    (out, back), (sent, got) = levels.across(place, widths), levels.within(place, widths)
    own = levels.here(place).index(place)
    sent[own] = got[own] = 0
    some = int((back > 0).sum())
    return Traffic(
        int(out.sum()) + sum(sent), int(back.sum()) + sum(got), int(back.sum()), some + sum(x > 0 for x in got), some
    )


def _by_rows(way: Route, nodes: Any, widths: Widths) -> Traffic:
    out, back = way.sizes(widths)
    out[way.own] = back[way.own] = 0
    apart = nodes != nodes[way.own]
    return Traffic(
        int(out.sum()), int(back.sum()), int(back[apart].sum()), int((back > 0).sum()), int((back[apart] > 0).sum())
    )


@pytest.mark.parametrize(
    ("counts", "per_node", "batch"), [([5, 2, 1], 2, 37), ([7, 9], 4, 53), ([2, 3, 5, 2], 3, 12), ([6, 6, 13], 5, 90)]
)
@pytest.mark.parametrize("order", ["contiguous", "interleaved"])
def test_what_is_counted_of_all_is_what_each_sends(counts: list[int], per_node: int, batch: int, order: str) -> None:
    placement = balanced([1.0] * len(counts), sum(counts), 0, counts, order=order)  # type: ignore[arg-type]
    placement = replace(placement, per_node=per_node)
    near = tuple(range(5, 5 + len(counts)))
    for everywhere in (False, True):
        widths = Widths(near, (3,) * len(counts) if everywhere else (0,) * len(counts), NUMBERS_OF_A_ROW * everywhere)
        way = route(placement, placement.cut(batch)[0], everywhere=everywhere)
        nodes = placement.nodes(way.ranks)
        assert in_one_level(way, nodes, widths, 1) == [
            _by_rows(replace(way, own=own), nodes, widths) for own in range(len(way.ranks))
        ]
        levels = hierarchy(way, nodes)
        assert levels is not None
        assert in_two_levels(levels, widths, 1) == [_by_parts(levels, own, widths) for own in range(len(way.ranks))]


def _gradients(counts: list[int], per_node: int) -> Any:
    placement = _placed(counts, per_node)
    exchange = Exchange(placement, group_of(placement.exchange_ranks), judge=judge_of("hierarchical", AUTO))
    [share] = placement.cut(ROWS)
    [k] = placement.residents
    rows = torch.arange(share.rows.start, share.rows.stop, dtype=torch.float32)
    x = (rows + 1)[:, None].requires_grad_()
    with Recorder() as recorder:
        signals = exchange({k: {"logits": x}}, "differentiable", share=share)
        value = torch.stack(
            [(placement.rank + 1) * (j + 1) * s["logits"].pow(3).sum() for j, s in enumerate(signals)]
        ).sum()
        recorder.calls.clear()
        [first] = torch.autograd.grad(value, x, create_graph=True)
        back = [call for call in recorder.calls if call.collective == "alltoall_base"]
        [second] = torch.autograd.grad((first * rows[:, None]).sum(), x)
    return k, rows, first.detach(), second, back


def test_gradients_are_added_up_in_a_node_and_cross_once() -> None:
    """As in one level: x of peer k, row n weighs (k + 1) times the sum of rank + 1 over the ranks that see the row."""
    counts = [2, 1, 1]
    places = [balanced([1.0] * 3, 4, rank, counts) for rank in range(4)]
    seen = [place.cut(ROWS)[0].rows for place in places]
    results = run_world(4, _gradients, counts, 2)
    for k, rows, first, second, _ in results:
        for n, a, b in zip(rows.tolist(), first.flatten().tolist(), second.flatten().tolist(), strict=True):
            weights = sum(rank + 1 for rank in range(4) if n in seen[rank])
            assert a == pytest.approx((k + 1) * weights * 3 * (n + 1) ** 2)
            assert b == pytest.approx((k + 1) * weights * 6 * (n + 1) * n)
    # Within the node first, and what crosses is as much as on the way there: 11 rows of each of three peers.
    for *_, back in results:
        assert [len(call.ranks) for call in back] == [2, 4]
    assert sum(back[1].size for *_, back in results) == FLOAT * 3 * 11


def _nodes_unlike() -> Any:
    placement = _placed([2, 1, 1], 2 if dist.get_rank() < 2 else 1)
    exchange = Exchange(placement, group_of(placement.exchange_ranks), judge=judge_of("hierarchical", AUTO))
    [share] = placement.cut(ROWS)
    own = {k: {"logits": torch.ones(len(share.rows), 2)} for k in placement.residents}
    exchange(own, share=share)
    with Recorder() as recorder:
        exchange(own, share=share)
    return [len(call.ranks) for call in recorder.calls]


def test_where_nodes_are_not_alike_there_is_one_level() -> None:
    assert run_world(4, _nodes_unlike) == [[4]] * 4


def test_auto_takes_two_levels_where_that_is_foretold_to_be_faster() -> None:
    """Two peers: no row is seen by two ranks of a node. Embeddings that go everywhere: 8 ranks of a node want each."""
    for counts, wide, two in (([12, 4], 0, False), ([12, 4], 512, True), ([8, 4, 4], 0, False)):
        placement = replace(balanced([1.0] * len(counts), 16, 0, counts), per_node=8)
        way = route(placement, placement.cut(4096)[0], everywhere=wide > 0)
        levels = hierarchy(way, placement.nodes(way.ranks))
        judge = judge_of("auto", AUTO)
        assert levels is not None
        assert judge is not None
        verdict = judge(levels, Widths((1000,) * len(counts), (wide,) * len(counts)), 4, True)
        assert verdict.two == two, verdict.why

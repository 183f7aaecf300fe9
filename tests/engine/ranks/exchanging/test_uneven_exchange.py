"""The exchange where ranks have unequal numbers of rows: who gets what, in how many calls and bytes, and back again."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from engine.ranks.collectives import all_to_all_with_gradient, group_of
from engine.ranks.exchanging.exchange import Exchange
from engine.ranks.exchanging.routes import NUMBERS_OF_A_ROW, route
from engine.ranks.exchanging.traffic import traffic
from engine.ranks.placement import Placement
from engine.ranks.planning.choosing import balanced
from tests.engine.ranks.exchanging.test_exchange import (
    BF16,
    CLASS_IDS,
    FLOAT,
    IMAGE_IDS,
    Call,
    Recorder,
    agreement,
    calls_of_a_step,
)
from tests.engine.stepping import CLASSES, config_of
from tests.marks import slow
from tests.worlds import run_world

ROWS = 11


def value(peer: int, rows: Tensor, width: int) -> Tensor:
    """Of peer k, row n, column c: 100 k + n + c / 8, which bf16 does not hold and float32 does."""
    return (100.0 * peer + rows)[:, None] + torch.arange(width) / 8


def assert_rows(
    found: Sequence[Mapping[str, Tensor]],
    mine: Tensor,
    residents: Sequence[int],
    everywhere: Sequence[str],
    wire: torch.dtype,
) -> None:
    """What a rank with rows `mine` is to see of each peer: its own as they are, others by way of the wire, and all rows
    of what is wanted everywhere, its own first."""
    rolled = torch.arange(ROWS).roll(-int(mine[0]))
    for k, peer in enumerate(found):
        for name, width in (("logits", 2 + k), ("wide", 3)):
            expected = value(k, mine, width)
            assert torch.equal(peer[name], expected if k in residents else expected.to(wire).float())
        if everywhere:
            assert torch.equal(peer["all_wide"], value(k, rolled, 3).to(wire).float())
            assert torch.equal(peer["all_targets"], CLASS_IDS[rolled])
            assert torch.equal(peer["all_ids"], IMAGE_IDS[rolled])


def _shown(counts: list[int], everywhere: list[str], wire: torch.dtype, mode: str, order: str) -> Any:
    placement = balanced([1.0] * len(counts), dist.get_world_size(), dist.get_rank(), counts, order=order)  # type: ignore[arg-type]
    exchange = Exchange(placement, group_of(placement.exchange_ranks), wire)
    [share] = placement.cut(ROWS)
    mine = torch.arange(ROWS)[share.rows.start : share.rows.stop]
    own = {k: {"logits": value(k, mine, 2 + k), "wide": value(k, mine, 3)} for k in placement.residents}
    labels = (CLASS_IDS[mine], IMAGE_IDS[mine]) if everywhere else None
    asked: dict[str, Any] = {"share": share, "everywhere": everywhere, "labels": labels}
    exchange(own, mode, **asked)  # type: ignore[arg-type]
    with Recorder() as recorder:
        found = exchange(own, mode, **asked)  # type: ignore[arg-type]
    wide = dict.fromkeys(range(len(counts)), 3) if everywhere else None
    near = {k: 2 + k + (0 if everywhere else 3) for k in range(len(counts))}
    return mine, list(placement.residents), found, recorder.calls, traffic(placement, share, near, wide, wire)


@pytest.mark.parametrize("order", ["contiguous", "interleaved"])
@pytest.mark.parametrize("mode", ["detached", "differentiable"])
@pytest.mark.parametrize("wire", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("everywhere", [[], ["wide"]])
@pytest.mark.parametrize("counts", [[1, 2], slow([3, 1, 2])])
def test_each_rank_gets_the_rows_that_it_sees_in_one_call(
    counts: list[int], everywhere: list[str], wire: torch.dtype, mode: str, order: str
) -> None:
    world = sum(counts)
    results = run_world(world, _shown, counts, everywhere, wire, mode, order)
    for mine, residents, found, calls, bytes_ in results:
        assert_rows(found, mine, residents, everywhere, wire)
        [call] = calls
        assert (call.collective, call.ranks) == ("alltoall_base", tuple(range(world)))
        # What stays on the rank is no traffic: its own wide rows and their labels.
        kept = len(mine) * (3 * len(residents) + NUMBERS_OF_A_ROW) * wire.itemsize if everywhere else 0
        assert call.size == bytes_.sent + kept
    assert sum(bytes_.sent for *_, bytes_ in results) == sum(bytes_.received for *_, bytes_ in results)


def test_what_is_sent_by_hand() -> None:
    """11 rows of peer 0 on one rank; of peer 1, 5 and 6 on two. Peer 0 shows logits 2 wide and peer 1 3 wide, and both
    have 3 more: 5 and 6 numbers a row. Half of the rows of peer 0 go to each rank, which gives its half of peer 1.
    """
    near = {0: 5, 1: 6}
    places = [balanced([1, 1], 3, rank, [1, 2]) for rank in range(3)]
    found = [traffic(place, place.cut(ROWS)[0], near) for place in places]
    assert [(x.sent, x.received) for x in found] == [
        (FLOAT * 11 * 5, FLOAT * 11 * 6),
        (FLOAT * 5 * 6, FLOAT * 5 * 5),
        (FLOAT * 6 * 6, FLOAT * 6 * 5),
    ]
    # Even placements have an all-gather, padded to the longest: two ranks of 12 rows.
    [share] = Placement.even(2, 1, 2, 0).cut(12)
    one = traffic(Placement.even(2, 1, 2, 0), share, near, wire=torch.bfloat16)
    assert (one.sent, one.received) == (BF16 * 12 * 6, BF16 * 12 * 6)


def test_a_step_of_dml_is_one_uneven_all_to_all_of_logits() -> None:
    placement = {"kind": "balanced", "ranks": {"p0": 1, "p1": 2}}
    peers = [{"network": "cifar_resnet8_b", "name": f"p{k}", "options": {"width": 4}} for k in range(2)]
    logits = FLOAT * CLASSES
    for rank, (calls, gradients) in enumerate(
        run_world(3, calls_of_a_step, config_of(None, peers, placement=placement))
    ):
        sent = [12, 6, 6][rank]
        assert calls[0] == Call("exchange", "alltoall_base", (0, 1, 2), logits * sent)
        assert calls[-1] == agreement(3)
        between = calls[1:-1]
        assert {call[:3] for call in between} == ({("backward", "allreduce", (1, 2))} if rank else set())
        assert sum(call.size for call in between) == (gradients if rank else 0)


def _gradients(counts: list[int]) -> Any:
    placement = balanced([1.0] * len(counts), dist.get_world_size(), dist.get_rank(), counts)
    exchange = Exchange(placement, group_of(placement.exchange_ranks))
    [share] = placement.cut(ROWS)
    [k] = placement.residents
    rows = torch.arange(share.rows.start, share.rows.stop, dtype=torch.float32)
    x = (rows + 1)[:, None].requires_grad_()
    signals = exchange({k: {"logits": x}}, "differentiable", share=share)
    # Of peer j on rank r: (r + 1) (j + 1) sum of cubes, so that the second derivative is there to be looked at.
    value = torch.stack(
        [(placement.rank + 1) * (j + 1) * s["logits"].pow(3).sum() for j, s in enumerate(signals)]
    ).sum()
    [first] = torch.autograd.grad(value, x, create_graph=True)
    [second] = torch.autograd.grad((first * rows[:, None]).sum(), x)
    return k, rows, first.detach(), second


def test_gradients_and_gradients_of_gradients_come_back_to_their_rows() -> None:
    counts = [1, 2, 3]
    places = [balanced([1.0] * 3, 6, rank, counts) for rank in range(6)]
    seen = [place.cut(ROWS)[0].rows for place in places]
    for k, rows, first, second in run_world(6, _gradients, counts):
        for n, a, b in zip(rows.tolist(), first.flatten().tolist(), second.flatten().tolist(), strict=True):
            weights = sum(rank + 1 for rank in range(6) if n in seen[rank])
            assert a == pytest.approx((k + 1) * weights * 3 * (n + 1) ** 2)
            assert b == pytest.approx((k + 1) * weights * 6 * (n + 1) * n)


def _whole(counts: list[int]) -> Any:
    placement = balanced([1.0] * len(counts), dist.get_world_size(), dist.get_rank(), counts)
    exchange = Exchange(placement, group_of(placement.exchange_ranks))
    own = {k: {"weights": torch.arange(7.0 + k) + 10 * k, "one": torch.tensor(float(k))} for k in placement.residents}
    exchange.whole(own)
    with Recorder() as recorder:
        found = exchange.whole(own)
    return found, recorder.calls


def test_parameters_reach_every_rank_in_parts_from_all_that_hold_them() -> None:
    for rank, (found, calls) in enumerate(run_world(4, _whole, [3, 1])):
        for k, peer in enumerate(found):
            assert torch.equal(peer["weights"], torch.arange(7.0 + k) + 10 * k)
            assert peer["one"] == k
        # Peer 0 is 8 numbers on three ranks, 2, 3 and 3; peer 1 is 9, and three ranks want them.
        assert calls == [Call("", "alltoall_base", (0, 1, 2, 3), FLOAT * [2, 3, 3, 27][rank])]


def _adjoint() -> None:
    rank = dist.get_rank()
    sent, received = ([2, 1], [2, 3]) if rank == 0 else ([3, 0], [1, 0])
    x = torch.randn(3, dtype=torch.float64, generator=torch.Generator().manual_seed(rank), requires_grad=True)
    group = dist.group.WORLD
    assert group is not None
    y = all_to_all_with_gradient(x, sent, received, group)
    assert y.shape == (sum(received),)
    seed = torch.randn(len(y), dtype=torch.float64, generator=torch.Generator().manual_seed(10 + rank))
    (y * seed).sum().backward()
    # <A x, s> = <x, A' s>, over both ranks.
    both = torch.stack([(y * seed).sum(), (x * x.grad).sum()]).detach()
    dist.all_reduce(both)
    torch.testing.assert_close(both[0], both[1])


def test_backward_is_the_way_back() -> None:
    run_world(2, _adjoint)


@pytest.mark.parametrize(("small", "large"), [([1, 3], [1024, 3072]), ([1, 1, 2], [512, 512, 1024])])
def test_what_a_rank_talks_to_and_holds_does_not_grow_with_the_world(small: list[int], large: list[int]) -> None:
    widths = dict.fromkeys(range(len(small)), 10)
    few = [balanced([1.0] * len(small), sum(small), rank, small) for rank in range(sum(small))]
    world, times = sum(large), sum(large) // sum(small)
    batch = 12 * sum(small)
    most = max(traffic(place, place.cut(batch)[0], widths).received for place in few)
    whole = balanced([1.0] * len(large), world, 0, large)
    sent = received = 0
    for rank in range(world):
        place = whole.of(rank)
        [share] = place.cut(batch * times)
        assert len(place.exchange_ranks) == sum(small)
        bytes_ = traffic(place, share, widths)
        assert bytes_.received <= most
        sent, received = sent + bytes_.sent, received + bytes_.received
    assert sent == received


@pytest.mark.parametrize(
    ("counts", "order"), [([2, 3], "contiguous"), ([9, 4, 1], "interleaved"), ([613, 411], "contiguous")]
)
def test_routes_match_at_both_ends(counts: list[int], order: str) -> None:
    whole = balanced([1.0] * len(counts), sum(counts), 0, counts, order=order)  # type: ignore[arg-type]
    ranks = range(0, sum(counts), max(1, sum(counts) // 40))
    ways = {rank: route(whole.of(rank), whole.of(rank).cut(4 * sum(counts) + 1)[0], everywhere=False) for rank in ranks}
    for rank, way in ways.items():
        covered: dict[int, list[int]] = {}
        for other, group, common in zip(way.ranks, way.groups, way.common, strict=True):
            covered.setdefault(group, []).extend(common)
            if other in ways:
                back = ways[other]
                assert list(back.common[list(back.ranks).index(rank)]) == list(common)
        own = way.groups[way.own]
        for group, rows in covered.items():
            assert rows == ([] if group == own else list(way.mine))

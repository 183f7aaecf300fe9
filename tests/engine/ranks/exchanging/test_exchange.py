"""Promise 4: one exchange a step. Every collective of a real step is seen at torch's dispatcher, and counted in calls
and bytes by the group that it runs on."""

from __future__ import annotations

from collections import Counter
from typing import Any, NamedTuple

import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from engine.config import RunConfig
from engine.ranks.collectives import all_gather, all_gather_with_gradient, group_of
from engine.ranks.exchanging.exchange import Exchange
from engine.ranks.placement import Placement
from engine.training.step import train_step
from engine.training.timing import Clock
from losses import Progress
from tests.engine.cohort.test_contract import Consensus, with_method
from tests.engine.stepping import CLASSES, CPU, STEPS_PER_EPOCH, batches, cohort_of, config_of, do_steps
from tests.marks import slow
from tests.worlds import run_world

ROWS, FLOAT, BF16 = 12, 4, 2


class Call(NamedTuple):
    part: str
    """Of the step, as its clock calls it."""
    collective: str
    ranks: tuple[int, ...]
    size: int
    """Bytes that one rank puts in."""


class Recorder(TorchDispatchMode):
    """Sees every collective, those that DDP starts from C++ during the backward pass too."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[Call] = []

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if function.namespace in ("c10d", "_c10d_functional"):
            name = function._opname.strip("_")
            if name not in ("wait_tensor", "wrap_tensor_autograd"):
                group = _group(args)
                # c10d's collectives from and into one tensor take (output, input), all others their input first.
                sent = args[1] if name.endswith("_base") else args[0]
                size = sum(x.numel() * x.element_size() for x in tree_leaves(sent))
                self.calls.append(Call("", name, tuple(dist.get_process_group_ranks(group)), size))
        return function(*args, **(kwargs or {}))


def _group(arguments: Any) -> dist.ProcessGroup:
    """The process group that an operator was given: boxed by c10d, by name in functional collectives."""
    for argument in arguments:
        if isinstance(argument, torch.ScriptObject):
            return dist.ProcessGroup.unbox(argument)
        if isinstance(argument, str) and argument.isdigit():
            return dist.distributed_c10d._resolve_process_group(argument)
    raise AssertionError(f"no process group among {arguments}")


class Parts(Clock):
    """Names the part of the step that each collective was in."""

    def __init__(self, recorder: Recorder) -> None:
        self._recorder = recorder
        super().__init__(CPU)

    def mark(self, name: str) -> None:
        self._recorder.calls = [call if call.part else call._replace(part=name) for call in self._recorder.calls]


def calls_of_a_step(config: RunConfig, method: Any = None) -> tuple[list[Call], int]:
    """The collectives of step 2, and the bytes of this rank's gradients. Once, in step 0, ranks tell each other shapes,
    and once, in step 1, DDP agrees on its buckets."""
    cohort = cohort_of(config, method=method)
    do_steps(cohort, [0, 1])
    with Recorder() as recorder:
        for step, pieces in batches(cohort, [2]):
            train_step(cohort, pieces, Progress(step, STEPS_PER_EPOCH, 2), Parts(recorder))
    gradients = sum(p.numel() for r in cohort.residents.values() for p in r.peer.parameters())
    return recorder.calls, gradients * FLOAT


def counted(ranks: int, placement: dict[str, Any], method: dict[str, Any] | None = None, peers: int = 2, **rest: Any):
    return run_world(ranks, calls_of_a_step, config_of(method, peers, placement=placement, **rest))


def agreement(world: int) -> Call:
    """On whether all ranks met finite numbers and none got a signal: 8 bytes over the world, the only other
    communication of a step."""
    return Call("optimizer", "allreduce", tuple(range(world)), 2 * FLOAT)


# -- the instrument ---------------------------------------------------------------------------------------------------


def known_calls() -> list[Call]:
    network = torch.nn.parallel.DistributedDataParallel(torch.nn.Linear(3, 2))
    pair = dist.new_group([0, 1])
    with Recorder() as recorder:
        network(torch.ones(1, 3)).sum().backward()
        all_gather(torch.ones(5), pair) if dist.get_rank() < 2 else None
        x = torch.ones(7, requires_grad=True)
        all_gather_with_gradient(x, dist.group.WORLD).sum().backward()
        dist.all_reduce(torch.ones(2, dtype=torch.float64))
    return recorder.calls


def test_the_recorder_sees_every_collective() -> None:
    world = (0, 1, 2)
    pair = [Call("", "allgather_base", (0, 1), 20)]
    rest = [
        Call("", "allgather_base", world, 28),
        Call("", "reduce_scatter_base", world, 84),
        Call("", "allreduce", world, 16),
    ]
    for rank, calls in enumerate(run_world(3, known_calls)):
        assert calls == [Call("", "allreduce", world, 32), *(pair if rank < 2 else []), *rest]


# -- one training step ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("peers", [2, 3])
def test_dml_spread_is_one_all_gather_of_logits(peers: int) -> None:
    for calls, _ in counted(peers, {"kind": "spread"}, peers=peers):
        everyone = tuple(range(peers))
        logits = Call("exchange", "allgather_base", everyone, FLOAT * ROWS * CLASSES)
        assert calls == [logits, agreement(peers)]


def test_independent_exchanges_nothing() -> None:
    for calls, _ in counted(2, {"kind": "spread"}, {"name": "independent"}):
        assert calls == [agreement(2)]


def test_dml_sequential_exchanges_before_each_turn() -> None:
    logits = Call("exchange", "allgather_base", (0, 1, 2), FLOAT * ROWS * CLASSES)
    for calls, _ in counted(3, {"kind": "spread"}, {"name": "dml", "order": "sequential"}, peers=3):
        assert calls == [logits, agreement(3)] * 3


def test_hybrid_sends_both_residents_in_one_buffer() -> None:
    logits = Call("exchange", "allgather_base", (0, 1), FLOAT * ROWS * 2 * CLASSES)
    for calls, _ in counted(2, {"kind": "hybrid", "peers_per_rank": 2}, peers=4):
        assert calls == [logits, agreement(2)]


def test_bf16_on_the_wire_halves_the_bytes() -> None:
    logits = Call("exchange", "allgather_base", (0, 1), BF16 * ROWS * CLASSES)
    for calls, _ in counted(2, {"kind": "spread", "exchange_dtype": "bf16"}):
        assert calls == [logits, agreement(2)]


def test_colocated_alone_exchanges_nothing() -> None:
    [(calls, _)] = counted(1, {"kind": "colocated"})
    assert calls == []


def test_colocated_over_replicas_averages_gradients_and_exchanges_nothing() -> None:
    for calls, gradients in counted(2, {"kind": "colocated"}):
        *backward, last = calls
        assert last == agreement(2)
        assert {call[:3] for call in backward} == {("backward", "allreduce", (0, 1))}
        assert sum(call.size for call in backward) == gradients


def test_gradients_stay_in_the_replica_group_and_signals_in_the_exchange_group() -> None:
    for rank, (calls, gradients) in enumerate(counted(4, {"kind": "spread"})):
        replicas, exchanging = ((0, 1), (2, 3))[rank // 2], ((0, 2), (1, 3))[rank % 2]
        assert calls[0] == Call("exchange", "allgather_base", exchanging, FLOAT * ROWS // 2 * CLASSES)
        assert calls[-1] == agreement(4)
        assert {call[:3] for call in calls[1:-1]} == {("backward", "allreduce", replicas)}
        assert sum(call.size for call in calls[1:-1]) == gradients


def test_accumulation_averages_gradients_once_and_exchanges_each_micro_batch() -> None:
    micro = {"epochs": 2, "accumulation": 3}
    for calls, gradients in counted(4, {"kind": "spread"}, train=micro):
        times = Counter(call.part for call in calls)
        assert times["exchange"] == 3
        assert {call.size for call in calls if call.part == "exchange"} == {FLOAT * ROWS // 2 // 3 * CLASSES}
        assert sum(call.size for call in calls if call.part == "backward") == gradients


def test_differentiable_adds_one_reduce_scatter_in_the_backward_pass() -> None:
    config = with_method(config_of({"name": "independent"}, 3, placement={"kind": "spread"}), Consensus)
    for calls, _ in run_world(3, calls_of_a_step, config, Consensus):
        size = FLOAT * ROWS * CLASSES
        assert calls == [
            Call("exchange", "allgather_base", (0, 1, 2), size),
            Call("backward", "reduce_scatter_base", (0, 1, 2), 3 * size),
            agreement(3),
        ]


# -- the exchange alone -----------------------------------------------------------------------------------------------


def signals_of(peer: int) -> dict[str, Tensor]:
    """Peers differ in the widths of one signal, and in having another at all."""
    draw = torch.Generator().manual_seed(peer)
    signals = {"logits": torch.randn(4, 3, generator=draw), "wide": torch.randn(4, 1 + 5 * peer, 2, generator=draw)}
    return signals | ({"only_of_the_last": torch.randn(4, generator=draw)} if peer == 3 else {})


def exchanged(peers_per_rank: int, mode: str, wire: torch.dtype) -> Any:
    placement = Placement.even(4, peers_per_rank, dist.get_world_size(), dist.get_rank())
    exchange = Exchange(placement, group_of(placement.exchange_ranks), wire)
    own = {k: {n: x.requires_grad_() for n, x in signals_of(k).items()} for k in placement.residents}
    with Recorder() as recorder:
        first = exchange(own, mode)
        before = len(recorder.calls)
        second = exchange(own, mode)
    for a, b in zip(first, second, strict=True):
        assert all(torch.equal(a[name], b[name]) for name in a)
    live = [{name: x.requires_grad for name, x in peer.items()} for peer in first]
    same = all(first[k][name] is own[k][name] for k in own for name in own[k])
    tensors = [{name: x.detach() for name, x in peer.items()} for peer in first]
    return tensors, live, same, recorder.calls[before:], list(placement.residents)


@pytest.mark.parametrize(("ranks", "peers_per_rank"), [(4, 1), (2, 2), (1, 4)])
def test_everybody_gets_the_signals_of_all_peers_at_unequal_widths(ranks: int, peers_per_rank: int) -> None:
    for tensors, live, same, _, residents in run_world(ranks, exchanged, peers_per_rank, "detached", torch.float32):
        assert same, "the residents' own tensors must come back themselves"
        for k in range(4):
            expected = signals_of(k)
            assert list(tensors[k]) == list(expected)
            assert all(torch.equal(tensors[k][name], expected[name]) for name in expected)
            assert set(live[k].values()) == {k in residents}


def test_unequal_widths_are_padded_to_the_longest_in_one_call() -> None:
    longest = FLOAT * (4 * 3 + 4 * 16 * 2 + 4)
    for *_, calls, _ in run_world(4, exchanged, 1, "detached", torch.float32):
        assert calls == [Call("", "allgather_base", (0, 1, 2, 3), longest)]


def test_bf16_rounds_what_travels_and_nothing_else() -> None:
    for tensors, _, _, _, residents in run_world(2, exchanged, 2, "detached", torch.bfloat16):
        for k in range(4):
            for name, x in signals_of(k).items():
                assert torch.equal(tensors[k][name], x if k in residents else x.bfloat16().float())
                assert tensors[k][name].dtype == torch.float32


def test_mode_none_leaves_the_others_empty() -> None:
    for tensors, _, _, calls, residents in run_world(2, exchanged, 2, "none", torch.float32):
        assert calls == []
        assert [bool(peer) for peer in tensors] == [k in residents for k in range(4)]


def gradients_come_back(mode: str) -> Any:
    rank, world = dist.get_rank(), dist.get_world_size()
    placement = Placement.even(world, 1, world, rank)
    exchange = Exchange(placement, group_of(placement.exchange_ranks))
    x = torch.full((2, 3), float(rank), requires_grad=True)
    signals = exchange({rank: {"logits": x}}, mode)
    # Rank r's share of the objective is sum_k (r + 1)(k + 1) sum(x_k), so that dL/dx_k = (k + 1) sum_r (r + 1).
    sum((rank + 1) * (k + 1) * s["logits"].sum() for k, s in enumerate(signals)).backward()
    return x.grad


@pytest.mark.parametrize(("mode", "from_ranks"), [("differentiable", [0, 1, 2]), ("detached", None)])
def test_gradient_of_a_signal_is_summed_over_all_ranks_or_its_own(mode: str, from_ranks: list[int] | None) -> None:
    for k, gradient in enumerate(run_world(3, gradients_come_back, mode)):
        owners = [k] if from_ranks is None else from_ranks
        assert torch.equal(gradient, torch.full((2, 3), float((k + 1) * sum(r + 1 for r in owners))))


# -- all rows of the global batch -------------------------------------------------------------------------------------

CLASS_IDS = torch.tensor([0, 1, 255, 256, 257, 511, 513, 767, 998, 999, 1000, 769])
IMAGE_IDS = torch.tensor(
    [0, 255, 256, 65_535, 65_536, 65_537, 1_281_166, 1_281_165, 999_999, 777_777, 2**31 - 1, 2**32 - 1]
)


def all_rows(peers: int, peers_per_rank: int, wire: torch.dtype, mode: str) -> Any:
    """What this rank is shown of 12 rows, `wide` for all of them: of peer k, row n, column c, 100 k + n + c / 8."""
    placement = Placement.even(peers, peers_per_rank, dist.get_world_size(), dist.get_rank())
    exchange = Exchange(placement, group_of(placement.exchange_ranks), wire)
    mine = torch.arange(12)[placement.rows(12)]
    own = {
        k: {
            "logits": mine[:, None] * torch.ones(2),
            "wide": (100.0 * k + mine)[:, None] + torch.arange(2 + k) / 8,
        }
        for k in placement.residents
    }
    shown = [
        exchange(own, mode, private=["logits"], everywhere=["wide"], labels=(CLASS_IDS[mine], IMAGE_IDS[mine]))
        for _ in range(2)
    ]
    return mine, list(placement.residents), shown[1]


@pytest.mark.parametrize("mode", ["detached", "differentiable"])
@pytest.mark.parametrize("wire", [slow(torch.float32), torch.bfloat16])
@pytest.mark.parametrize(
    ("ranks", "peers", "peers_per_rank"), [(1, 2, 2), (2, 2, 2), (4, 2, 2), (2, 2, 1), (4, 2, 1), (4, 4, 2)]
)
def test_targets_and_ids_of_all_rows_arrive_exactly(
    ranks: int, peers: int, peers_per_rank: int, wire: torch.dtype, mode: str
) -> None:
    """This rank's rows first, then those of the replicas after it, round and round; bf16 has 8 digits."""
    replicas = ranks * peers_per_rank // peers
    for rank, (mine, residents, shown) in enumerate(run_world(ranks, all_rows, peers, peers_per_rank, wire, mode)):
        order = torch.arange(12).roll(-(rank % replicas) * (12 // replicas))
        assert torch.equal(order[: len(mine)], mine)
        for k, peer in enumerate(shown):
            assert peer["all_targets"].dtype == peer["all_ids"].dtype == torch.int64
            assert torch.equal(peer["all_targets"], CLASS_IDS[order])
            assert torch.equal(peer["all_ids"], IMAGE_IDS[order])
            expected = (100.0 * k + order)[:, None] + torch.arange(2 + k) / 8
            sent = expected if ranks == 1 else expected.to(wire).float()
            assert torch.equal(peer["all_wide"], sent)
            assert ("logits" in peer) == (k in residents)
            assert torch.equal(peer["wide"], expected[: len(mine)] if k in residents else sent[: len(mine)])

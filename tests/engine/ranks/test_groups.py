"""Groups of ranks: who is in them, and that none is left over when a cohort is built anew, as after a rollback."""

from __future__ import annotations

import os

import pytest
import torch
import torch.distributed as dist
from torch.testing._internal.distributed.fake_pg import FakeStore

from engine.ranks.collectives import Launch, group_of, is_shared, leave, start
from engine.ranks.placement import Placement
from tests.engine.stepping import cohort_of, config_of, do_steps
from tests.worlds import leave_last, run_ranks, run_world


def _sums(peers_per_rank: int) -> list[float]:
    """What adding up ranks in this rank's two groups gives."""
    placement = Placement.even(4, peers_per_rank, dist.get_world_size(), dist.get_rank())
    found = []
    for ranks in (placement.replica_ranks, placement.exchange_ranks):
        group, number = group_of(ranks), torch.tensor([float(dist.get_rank())])
        dist.all_reduce(number, group=group)
        found.append(number.item())
    return found


def test_each_rank_is_in_the_group_of_its_replicas_and_in_that_of_its_rows() -> None:
    """Four ranks: two hold peers 0 and 1, two hold 2 and 3; ranks 0 and 2 see the same rows, and 1 and 3 do."""
    assert run_world(4, _sums, 2) == [[1.0, 2.0], [1.0, 4.0], [5.0, 2.0], [5.0, 4.0]]
    assert run_world(2, _sums, 4) == [[1.0, 0.0], [1.0, 1.0]]


def _left_over() -> tuple[int, int, int]:
    before = len(dist.distributed_c10d._world.pg_map)
    held = 0
    for _ in range(3):
        cohort = cohort_of(config_of(placement={"kind": "spread"}))
        do_steps(cohort, [0])
        held = len(dist.distributed_c10d._world.pg_map)
        cohort.close()
    return before, held, len(dist.distributed_c10d._world.pg_map)


@pytest.mark.parametrize("ranks", [2, 4])
def test_a_cohort_that_is_built_anew_leaves_no_group_behind(ranks: int) -> None:
    for before, held, after in run_world(ranks, _left_over):
        assert (held, after) == (before + 2, before)


def _asked(gpus: list[str]) -> bool:
    rank, world = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    address, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    store = dist.TCPStore(address, port, world, is_master=rank == 0)  # type: ignore[attr-defined]
    answer = is_shared(gpus[rank], store, world)
    leave_last(store, rank, world)
    return answer


@pytest.mark.parametrize(("gpus", "shared"), [(["a", "b", "c"], False), (["a", "b", "a"], True)])
def test_all_ranks_know_whether_any_two_share_a_gpu(gpus: list[str], shared: bool) -> None:
    assert run_ranks(3, _asked, gpus) == [shared] * 3


def _left_in_another_world() -> float:
    launch = Launch.from_environment()
    if launch.rank == 0:
        dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=launch.world)
        leave(group_of([0, 1]))
        dist.destroy_process_group()
    start(launch, torch.device("cpu"))
    number = torch.tensor([float(launch.rank + 1)])
    dist.all_reduce(number, group=group_of([0, 1]))
    dist.barrier()
    dist.destroy_process_group()
    return number.item()


def test_what_a_rank_left_before_its_world_is_not_remembered() -> None:
    """As after a rehearsal: the ranks would call the group by different names."""
    assert run_ranks(2, _left_in_another_world, timeout=60) == [3.0, 3.0]


def _leave_twice() -> bool:
    group = group_of(range(dist.get_world_size()))
    leave(group)
    leave(group)
    return True


def test_a_group_may_be_left_when_the_world_has_gone() -> None:
    assert run_world(2, _leave_twice) == [True, True]

"""Ranks that see other images or hold other weights than they should are found out."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from engine.cohort.cohort import Cohort
from engine.config import RunConfig
from engine.ranks.planning.choosing import plan
from engine.training.consistency import RanksDisagreeError, check_same_rows, check_same_weights
from tests.runs import small_run
from tests.worlds import run_world


def _rows(config: RunConfig, ids: list[list[int]]) -> bool:
    rank = dist.get_rank()
    cohort = _cohort(config)
    return _raises(lambda: check_same_rows(cohort, torch.tensor(ids[rank]), 3))


def _weights(config: RunConfig, damaged_rank: int | None) -> bool:
    cohort = _cohort(config)
    if dist.get_rank() == damaged_rank:
        with torch.no_grad():
            weight = next(next(iter(cohort.residents.values())).peer.parameters())
            weight.view(-1)[0] = torch.nextafter(weight.view(-1)[0], torch.tensor(torch.inf))
    return _raises(lambda: check_same_weights(cohort, 3))


def _cohort(config: RunConfig) -> Cohort:
    placement = plan(config, dist.get_world_size(), dist.get_rank())
    return Cohort(config, placement, torch.device("cpu"), num_classes=10, channels=1, image_size=28, steps_per_epoch=5)


def _raises(check: object) -> bool:
    try:
        check()  # type: ignore[operator]
    except RanksDisagreeError:
        return True
    return False


@pytest.mark.parametrize(
    ("ids", "found"),
    [
        ([[4, 9, 2], [4, 9, 2]], False),
        ([[4, 9, 2], [4, 9, 3]], True),
        ([[4, 9, 2], [9, 4, 2]], True),
        ([[4, 9, 2], [3, 10, 2]], True),
    ],
)
def test_other_samples_or_another_order_are_found_on_every_rank(
    tiny: Path, tmp_path: Path, ids: list[list[int]], found: bool
) -> None:
    assert run_world(2, _rows, small_run(tiny, tmp_path, data={"global_batch": 3}), ids) == [found, found]


@pytest.mark.parametrize(("last", "found"), [([9, 2], False), ([2, 9], True)])
def test_also_where_ranks_see_parts_of_what_others_see(
    tiny: Path, tmp_path: Path, last: list[int], found: bool
) -> None:
    names = {"cifar_resnet8_b-0": 1, "cifar_resnet8_b-1": 2}
    config = small_run(tiny, tmp_path, data={"global_batch": 3}, placement={"kind": "balanced", "ranks": names})
    assert run_world(3, _rows, config, [[4, 9, 2], [4], last]) == [found] * 3


def test_replicas_of_a_peer_may_see_different_samples(tiny: Path, tmp_path: Path) -> None:
    config = small_run(tiny, tmp_path, data={"global_batch": 4}, placement={"kind": "colocated"})
    assert run_world(2, _rows, config, [[1, 2], [3, 4]]) == [False, False]


@pytest.mark.parametrize("damaged_rank", [None, 0, 3])
def test_one_bit_in_one_replica_is_found_by_its_group_alone(
    tiny: Path, tmp_path: Path, damaged_rank: int | None
) -> None:
    """Spread over 4 ranks: ranks 0 and 1 hold peer 0, ranks 2 and 3 peer 1."""
    expected = {None: [False] * 4, 0: [True, True, False, False], 3: [False, False, True, True]}
    assert run_world(4, _weights, small_run(tiny, tmp_path), damaged_rank) == expected[damaged_rank]

"""Scores where ranks have unequal parts of the validation split: the same as from a plain loop over single images."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import nn

from engine.ranks.collectives import group_of
from engine.ranks.exchanging.exchange import Exchange
from engine.ranks.planning.choosing import balanced
from engine.training.evaluation import Scores, evaluate
from tests.engine.training.test_evaluation import CPU, Cut, assert_same_scores, by_hand, networks
from tests.worlds import run_world


def _scored(peers: list[nn.Module], counts: list[int] | None, pipeline: Any, batch: int) -> Scores:
    costs = [float(k + 1) for k in range(len(peers))]
    placement = balanced(costs, dist.get_world_size(), dist.get_rank(), counts)
    exchange = Exchange(placement, group_of(placement.exchange_ranks), torch.bfloat16)
    own = {k: peers[k] for k in placement.residents}
    return evaluate(own, exchange, placement, pipeline, batch=batch, device=CPU)


@pytest.mark.parametrize(
    ("counts", "world", "images"),
    [([1, 2], 3, 37), ([1, 3, 1], 5, 2), (None, 2, 37)],
    ids=["uneven", "fewer images than ranks", "three peers on two ranks"],
)
def test_every_image_counts_once(tiny: Path, counts: list[int] | None, world: int, images: int) -> None:
    pipeline = Cut(tiny, images)
    cohort = networks(len(counts) if counts else 3, tiny)
    expected = by_hand(cohort, pipeline)
    for found in run_world(world, _scored, cohort, counts, pipeline, 5):
        assert_same_scores(found, expected)

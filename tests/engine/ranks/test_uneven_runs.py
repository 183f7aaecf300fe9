"""Whole runs on uneven ranks against the same on one: what only a pipeline and a loop bring with them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tests.runs import assert_same_weights, small_run, train_here, weights
from tests.worlds import run_ranks

FIXED = ["*bn*", "layer*.shortcut.1.*"]
"""BatchNorm, which would see other rows on each number of ranks."""

PEERS: list[dict[str, Any]] = [
    {"network": "cifar_resnet8_b", "name": f"p{k}", "options": {"width": width}, "frozen": FIXED}
    for k, width in enumerate((4, 8))
]

RUNS: dict[str, dict[str, Any]] = {
    "mixed images": {
        "method": {"name": "dml"},
        "data": {"augmentation": {"mixing": {"mixup_alpha": 0.8}, "label_smoothing": 0.1}, "global_batch": 22},
        "train": {"epochs": 1, "accumulation": 2},
    },
    "tuples of a class": {
        "method": {"name": "mcl"},
        "data": {"sampler": "class_tuples", "images_per_class": 2, "global_batch": 18},
        "train": {"epochs": 1},
    },
    "a survey of held-out images": {
        "method": {"name": "kdcl", "ensemble": "general"},
        "data": {"held_out": 0.2, "global_batch": 19},
        "train": {"epochs": 2},
    },
}


@pytest.mark.parametrize("name", RUNS)
def test_uneven_ranks_train_what_one_rank_trains(name: str, tiny: Path, tmp_path: Path) -> None:
    trained = []
    for ranks, placement in ((1, {"kind": "colocated"}), (3, {"kind": "balanced", "ranks": {"p0": 1, "p1": 2}})):
        folder = tmp_path / str(ranks)
        config = small_run(tiny, folder, peers=PEERS, placement=placement, optimizer={"lr": 0.01}, **RUNS[name])
        run_ranks(ranks, train_here, config)
        trained.append(weights(folder))
    assert_same_weights(trained[1], trained[0])

"""The recipes for ImageNet can be cut onto 8 GPUs, whole pairs and whole tuples of repeats."""

from __future__ import annotations

from pathlib import Path

import pytest

from engine.cohort.optim import check_optimizer
from engine.config.loading import load
from engine.ranks.choosing import plan

_FOLDER = Path(__file__).parents[3] / "configs/imagenet"
_RECIPES = ["resnet50_a2", "resnet50_a3", "resnet50_v2", "deit_small", "convnext_tiny"]


@pytest.mark.parametrize("method", ["independent", "dml"])
@pytest.mark.parametrize("recipe", _RECIPES)
def test_recipe(method: str, recipe: str) -> None:
    config = load(_FOLDER / f"{method}_{recipe}.yaml")
    check_optimizer(config.optimizer)
    placement = plan(config, 8, 0)
    assert placement.replicas == 4
    assert config.data.tuple_size == 2
    assert config.data.global_batch % (8 * config.train.accumulation * config.data.repeats) == 0
    assert config.data.augmentation.soft_targets

"""The recipes for ImageNet can be cut onto 8 GPUs, whole pairs and tuples of repeats, and a step of each be made."""

from __future__ import annotations

from pathlib import Path

import pytest

from engine.cohort.optim import check_optimizer
from engine.config.loading import load
from engine.ranks.planning.choosing import plan
from engine.rehearsal import Images, rehearse

_FOLDER = Path(__file__).parents[3] / "configs/imagenet"
_MIXED = ["resnet50_a2", "resnet50_a3", "resnet50_v2", "deit_small", "convnext_tiny"]
_RECIPES = [*_MIXED, "mobilenetv3_large", "efficientnet_b0"]


@pytest.mark.parametrize("method", ["independent", "dml"])
@pytest.mark.parametrize("recipe", _RECIPES)
def test_recipe(method: str, recipe: str) -> None:
    config = load(_FOLDER / f"{method}_{recipe}.yaml")
    check_optimizer(config.optimizer)
    placement = plan(config, 8, 0)
    assert placement.replicas == 4
    assert config.data.tuple_size == (2 if recipe in _MIXED else 1)
    assert config.data.global_batch % (8 * config.train.accumulation * config.data.repeats) == 0
    assert config.data.augmentation.soft_targets == (recipe != "mobilenetv3_large")


@pytest.mark.slow
@pytest.mark.parametrize("recipe", _RECIPES)
def test_a_step_of_it_can_be_made_and_fits(recipe: str) -> None:
    config = load(_FOLDER / f"dml_{recipe}.yaml")
    found = rehearse(config, plan(config, 8, 0), Images(1000, 3, config.data.side, 1_281_167))
    assert found.memory.total < 80 * 2**30
    # Optimisers that PyTorch has not fused ask the host whether to skip an update.
    allowed = recipe.endswith(("_a2", "_a3")) or "net_b0" in recipe or "mobilenet" in recipe
    assert not found.waits or allowed

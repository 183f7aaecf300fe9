"""A cohort whose weights are told apart at a glance, for tests of what a save writes."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist

from engine.cohort.cohort import Cohort
from engine.config import RunConfig
from engine.ranks.planning.choosing import plan


def a_cohort(config: RunConfig) -> Cohort:
    """The cohort of a run on this rank, with momentum in its optimisers."""
    placement = plan(config, dist.get_world_size(), dist.get_rank())
    sizes: Any = {"num_classes": 10, "channels": 1, "image_size": 28, "steps_per_epoch": 5}
    cohort = Cohort(config, placement, torch.device("cpu"), **sizes)
    fill(cohort, 1.0)
    return cohort


def fill(cohort: Cohort, value: float) -> None:
    """Every number that learns, and its momentum, becomes `value`."""
    for optimizer in cohort.optimizers():
        for group in optimizer.param_groups:
            for parameter in group["params"]:
                parameter.data.fill_(value)
                optimizer.state[parameter]["momentum_buffer"] = torch.full_like(parameter, value)

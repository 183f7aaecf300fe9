"""What is written anew so that a start need not wait for timm is what timm gives, bit for bit."""

from __future__ import annotations

import math
from typing import Any

import pytest
import timm.optim
import torch
from timm.scheduler import create_scheduler_v2
from torch import nn

from engine.cohort.optim import make_optimizer
from engine.cohort.parameter_groups import parameter_groups
from engine.cohort.schedule import Schedule
from engine.config import OptimizerConfig, ScheduleConfig

SCHEDULES: list[dict[str, Any]] = [
    {"name": "constant"},
    {"name": "constant", "warmup_epochs": 1.5},
    {"name": "step", "milestones": [2.0, 5.5, 9.0], "gamma": 0.1},
    {"name": "step", "every": 2.4, "gamma": 0.97, "warmup_epochs": 3, "warmup_lr": 1e-6},
    {"name": "cosine"},
    {"name": "cosine", "min_lr": 1e-3, "warmup_epochs": 2},
    {"name": "cosine", "min_lr": 1e-5, "warmup_epochs": 2.5, "warmup_lr": 0.0, "warmup_prefix": True},
]


@pytest.mark.parametrize("steps_per_epoch", [1, 7, 77])
@pytest.mark.parametrize("schedule", SCHEDULES, ids=str)
def test_rates(schedule: dict[str, Any], steps_per_epoch: int) -> None:
    config, steps = ScheduleConfig(**schedule), 12 * steps_per_epoch
    ours, theirs = (torch.optim.SGD(nn.Linear(2, 2).parameters(), lr=0.1) for _ in range(2))
    warmup = config.warmup_epochs * steps_per_epoch
    reference, _ = create_scheduler_v2(
        theirs,
        sched={"step": "multistep", "constant": "multistep"}.get(config.name, config.name),
        num_epochs=steps - warmup if config.warmup_prefix else steps,  # type: ignore[arg-type]
        # timm lets the rate fall one update before it is at a milestone.
        decay_milestones=[math.ceil(round(m * steps_per_epoch, 6)) + 0.5 for m in config.falls(12.0)],  # type: ignore[misc]
        decay_rate=config.gamma,
        min_lr=config.min_lr,
        warmup_epochs=warmup,  # type: ignore[arg-type]
        warmup_prefix=config.warmup_prefix,
        warmup_lr=config.warmup_lr,
        step_on_epochs=False,
        updates_per_epoch=1,
    )
    made = Schedule(ours, config, steps, steps_per_epoch)
    for update in range(steps):
        made.step_update(update)
        reference.step_update(update)
        assert ours.param_groups[0]["lr"] == theirs.param_groups[0]["lr"], update


@pytest.mark.parametrize("name", ["sgd", "momentum", "adam", "adamw"])
def test_optimisers(name: str) -> None:
    config = OptimizerConfig(name=name, lr=0.05, momentum=0.8, weight_decay=0.01, decay_norm_and_bias=False)
    network = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4))
    ours = make_optimizer(network, config)
    theirs = timm.optim.create_optimizer_v2(
        parameter_groups(network, config, {}), opt=name, lr=0.05, momentum=0.8, fused=True
    )
    assert type(ours) is type(theirs)
    for one, other in zip(ours.param_groups, theirs.param_groups, strict=True):
        assert {key: value for key, value in one.items() if key != "params"} == {
            key: value for key, value in other.items() if key != "params"
        }
        assert [id(p) for p in one["params"]] == [id(p) for p in other["params"]]

"""What stands in a line of metrics."""

from __future__ import annotations

import math

import pytest
import torch

from engine.reporting.lines import Stretch, training_line
from engine.safety.health import Signs
from engine.safety.spikes import Spike
from engine.training.meter import Reading
from tests.engine.stepping import config_of

CONFIG = config_of(peers=[{"network": "cifar_resnet8_b", "name": name} for name in "ab"])
"""Global batches of 12."""


def test_a_line_has_means_over_the_updates_that_were_made_and_the_speed() -> None:
    reading = Reading(
        terms={
            (0, "ce"): torch.tensor([1.0, math.nan, 3.0]).double(),
            (0, "kl"): torch.tensor([0.5, math.nan, 1.5]).double(),
            (None, "gate"): torch.tensor([4.0, math.nan, 5.0]).double(),
        },
        norms={0: torch.tensor([6.0, math.nan, 8.0]).double()},
        skipped=1,
        longest=(1, 1),
    )
    signs = Signs([Spike("b", step=0, loss=9.0, usual=1.0, count=2)], {"a": "no gradient"})
    stretch = Stretch(6, 10, epoch=2.5, seconds=0.5, parts={"data": 0.1, "forward": 0.2}, left_out=1, lr=0.05)
    line = training_line(CONFIG, stretch, reading, signs)
    assert line == pytest.approx(
        {
            "epoch": 2.5,
            "lr": 0.05,
            "train/a/ce": 2.0,
            "train/a/grad_norm": 7.0,
            "train/a/kl": 1.0,
            "train/cohort/gate": 4.5,
            "train/skipped": 1,
            "health/left_out": 1,
            "health/b/spikes": 2,
            "health/a/collapsed": 1,
            "speed/images_per_second": 96.0,  # 4 steps of 12 images in half a second
            "speed/data_ms": 25.0,
            "speed/forward_ms": 50.0,
        }
    )


def test_where_all_is_well_nothing_is_said_of_health() -> None:
    reading = Reading({(0, "ce"): torch.ones(2).double()}, {}, 0, (0, 0))
    stretch = Stretch(0, 2, epoch=1.0, seconds=1.0, parts={}, left_out=0, lr=0.1)
    keys = list(training_line(CONFIG, stretch, reading, Signs([], {})))
    assert keys == ["epoch", "lr", "train/a/ce", "train/skipped", "speed/images_per_second"]

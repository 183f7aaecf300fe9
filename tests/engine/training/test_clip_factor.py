"""Adaptive gradient clipping, from the equation: each unit's gradient against the norm of its weights."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from engine.config import ConfigError
from tests.engine.stepping import cohort_of, config_of, do_steps
from tests.worlds import run_world

FACTOR, RATE = 0.02, 0.05


def _gradients(factor: float | None) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """The weights before a step of plain SGD, and the gradients that it went by."""
    optimizer: dict[str, Any] = {"name": "momentum", "lr": RATE, "momentum": 0.0, "weight_decay": 0.0}
    config = config_of({"name": "independent"}, 1, train={"clip_factor": factor}, optimizer=optimizer)
    cohort = cohort_of(config)
    network = cohort.residents[0].peer.network
    before = {name: p.detach().double().clone() for name, p in network.named_parameters()}
    do_steps(cohort, [0])
    return before, {name: (before[name] - p.detach().double()) / RATE for name, p in network.named_parameters()}


def test_units_are_clipped_and_the_classifier_is_not() -> None:
    [(weights, plain)], [(_, clipped)] = (run_world(1, _gradients, factor) for factor in (None, FACTOR))
    touched = 0
    for name, gradient in plain.items():
        dims = tuple(range(1, gradient.ndim)) or (0,)
        largest = FACTOR * torch.linalg.vector_norm(weights[name], dim=dims, keepdim=True).clamp(min=1e-3)
        norm = torch.linalg.vector_norm(gradient, dim=dims, keepdim=True)
        expected = gradient if name.startswith("fc.") else gradient * (largest / norm.clamp(min=1e-12)).clamp(max=1)
        assert torch.allclose(clipped[name], expected, rtol=1e-3, atol=1e-5), name
        touched += not torch.allclose(expected, gradient)
    assert touched > 3


def test_one_kind_of_clipping_alone() -> None:
    with pytest.raises(ConfigError, match=r"train.clip_factor = 0.02: clip_norm = 1.0 clips too; expected one"):
        config_of(train={"clip_factor": 0.02, "clip_norm": 1.0})

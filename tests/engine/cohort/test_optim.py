"""Learning rates and optimisers against their closed forms and hand-made recurrences."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from engine.cohort.optim import (
    check_optimizer,
    gradient_norm,
    make_optimizer,
    set_weight_decay,
    update,
)
from engine.cohort.schedule import Schedule
from engine.config import ConfigError, OptimizerConfig, ScheduleConfig

NO_SCALER = torch.amp.GradScaler("cpu", enabled=False)


def rates(updates: list[int], epochs: int, steps_per_epoch: int, lr: float = 0.1, **schedule: Any) -> list[float]:
    optimizer = make_optimizer(nn.Linear(2, 2), OptimizerConfig(lr=lr))
    made = Schedule(optimizer, ScheduleConfig(**schedule), epochs * steps_per_epoch, steps_per_epoch)
    found = []
    for t in updates:
        made.step_update(t)
        found.append(optimizer.param_groups[0]["lr"])
    return found


# 77, 273 and 1077 are where floating point would let one of the rates fall one update late.
@pytest.mark.parametrize("per_epoch", [1, 3, 7, 77, 273, 391, 1077, 5004])
def test_step_falls_exactly_at_the_update_that_begins_the_epoch(per_epoch: int) -> None:
    updates = [0, *(m * per_epoch + d for m in (60, 120, 180) for d in (-1, 0)), 200 * per_epoch - 1]
    expected = [0.1, 0.1, 0.01, 0.01, 0.001, 0.001, 0.0001, 0.0001]
    found = rates(updates, 200, per_epoch, name="step", milestones=[60.0, 120.0, 180.0])
    np.testing.assert_allclose(found, expected, rtol=1e-12)


def test_step_at_every_update_of_many_lengths_of_an_epoch() -> None:
    for per_epoch in range(1, 400):
        found = rates(
            [150 * per_epoch - 1, 150 * per_epoch], 200, per_epoch, name="step", milestones=[150.0], gamma=0.5
        )
        assert found == [0.1, 0.05], per_epoch


def test_step_within_an_epoch_falls_at_the_first_update_not_before_it() -> None:
    # Update t begins t/4 epochs into the run: 0.5 epochs are done at t = 2, 1.6 epochs between t = 6 and t = 7.
    found = rates(list(range(12)), 3, 4, name="step", milestones=[0.5, 1.6], gamma=0.1)
    np.testing.assert_allclose(found, [0.1] * 2 + [0.01] * 5 + [0.001] * 5, rtol=1e-12)


def test_step_falls_every_so_many_epochs() -> None:
    # 2.4 epochs of 5 updates are 12, which is no multiple of 2.4 in floating point thrice over.
    found = rates(list(range(50)), 10, 5, name="step", every=2.4, gamma=0.5)
    np.testing.assert_allclose(found, [0.1 * 0.5 ** (t // 12) for t in range(50)], rtol=1e-12)


@pytest.mark.parametrize("min_lr", [0.0, 0.004])
def test_cosine(min_lr: float) -> None:
    epochs, per_epoch = 30, 7
    updates = [0, 1, 50, 105, 209]
    expected = [min_lr + 0.5 * (0.1 - min_lr) * (1 + math.cos(math.pi * t / 210)) for t in updates]
    np.testing.assert_allclose(rates(updates, epochs, per_epoch, min_lr=min_lr), expected, rtol=1e-12)


def test_warm_up_is_linear_and_then_joins_the_schedule_where_it_would_be() -> None:
    # 2 epochs of 5 updates from 0.01 to 0.1; update 10 is the first after them.
    updates = [0, 1, 9, 10, 25]
    warm = [0.01 + t * (0.1 - 0.01) / 10 for t in (0, 1, 9)]
    cosine = [0.05 * (1 + math.cos(math.pi * t / 50)) for t in (10, 25)]
    np.testing.assert_allclose(rates(updates, 10, 5, warmup_epochs=2, warmup_lr=0.01), warm + cosine, rtol=1e-12)
    constant = rates(updates, 10, 5, name="constant", warmup_epochs=2, warmup_lr=0.01)
    np.testing.assert_allclose(constant, [*warm, 0.1, 0.1], rtol=1e-12)


def test_a_schedule_may_begin_after_its_warm_up_which_may_begin_at_zero() -> None:
    # torchvision's SequentialLR: 2 epochs of 5 updates up, then a half cosine over the other 40.
    updates = [0, 1, 9, 10, 30, 49]
    warm = [0.1 * t / 10 for t in (0, 1, 9)]
    cosine = [0.05 * (1 + math.cos(math.pi * t / 40)) for t in (0, 20, 39)]
    found = rates(updates, 10, 5, warmup_epochs=2, warmup_lr=0.0, warmup_prefix=True)
    np.testing.assert_allclose(found, warm + cosine, rtol=1e-12)


def test_the_rate_depends_on_the_update_alone() -> None:
    """A resumed run sets the rate of its first update without having been through those before."""
    schedule = {"name": "step", "milestones": [2.0, 5.0], "warmup_epochs": 1}
    through = rates(list(range(32)), 8, 4, **schedule)
    assert [rates([t], 8, 4, **schedule)[0] for t in range(32)] == through


# -- SGD --------------------------------------------------------------------------------------------------------------


def quadratic(w: torch.Tensor) -> torch.Tensor:
    """1/2 sum a w^2 with a = 1, 2, 3, ...: its gradient is a w."""
    return (torch.arange(1, w.numel() + 1) * w.square()).sum() / 2


@pytest.mark.parametrize(("name", "nesterov"), [("sgd", True), ("momentum", False)])
def test_sgd_is_nesterov_and_momentum_is_not(name: str, nesterov: bool) -> None:
    module = nn.Linear(3, 1, bias=False)
    w, a, v = module.weight.detach().double().numpy()[0].copy(), np.arange(1.0, 4.0), np.zeros(3)
    optimizer = make_optimizer(module, OptimizerConfig(name=name, lr=0.05, momentum=0.8, weight_decay=0.01))
    for _ in range(3):
        optimizer.zero_grad()
        quadratic(module.weight[0]).backward()
        update(optimizer, torch.zeros(1), NO_SCALER)
        g = a * w + 0.01 * w
        v = 0.8 * v + g
        w = w - 0.05 * (g + 0.8 * v if nesterov else v)
        np.testing.assert_allclose(module.weight[0].detach(), w, rtol=1e-5)


@pytest.mark.parametrize("first", [0, 2])
@pytest.mark.parametrize("name", ["sgd", "momentum", "adamw", "lamb", "lars"])
def test_a_skipped_update_leaves_no_trace_at_whatever_step(name: str, first: int) -> None:
    """Fused SGD makes its momentum buffers of uninitialised memory in the first update, even where it is skipped."""

    def train(skips: list[int]) -> torch.Tensor:
        torch.manual_seed(0)
        module = nn.Sequential(nn.Linear(300, 40), nn.Linear(40, 1))
        optimizer = make_optimizer(module, OptimizerConfig(name=name, lr=0.01))
        # What an allocator hands out again is rarely zero.
        dirty = [torch.full((n,), 1e3) for n in (12000, 40, 40, 1) for _ in range(4)]
        del dirty
        for skip in skips:
            optimizer.zero_grad()
            (module(torch.ones(2, 300)).square().sum() * (torch.nan if skip else 1.0)).backward()
            update(optimizer, torch.tensor([float(skip)]), NO_SCALER)
        return torch.cat([p.detach().reshape(-1) for p in module.parameters()])

    skips = [0] * 4
    skips.insert(first, 1)
    spoilt = train(skips)
    assert spoilt.isfinite().all()
    assert torch.equal(spoilt, train([0] * 4))


# -- groups and names -------------------------------------------------------------------------------------------------


def decays(decay_norm_and_bias: bool) -> dict[str, float]:
    module = nn.Sequential(nn.Conv2d(1, 2, 3), nn.BatchNorm2d(2), nn.Flatten(), nn.Linear(2, 2))
    config = OptimizerConfig(weight_decay=0.3, decay_norm_and_bias=decay_norm_and_bias)
    names = {p: name for name, p in module.named_parameters()}
    groups = make_optimizer(module, config).param_groups
    assert sum(len(group["params"]) for group in groups) == len(names)
    return {names[p]: group["weight_decay"] for group in groups for p in group["params"]}


def test_everything_decays_by_default() -> None:
    assert set(decays(True).values()) == {0.3}


def test_biases_and_normalisation_can_be_left_out() -> None:
    assert {name for name, decay in decays(False).items() if decay} == {"0.weight", "3.weight"}


def test_options_reach_the_optimiser() -> None:
    config = OptimizerConfig(name="adamw", options={"betas": [0.8, 0.95]})
    assert list(make_optimizer(nn.Linear(1, 1), config).param_groups[0]["betas"]) == [0.8, 0.95]


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (OptimizerConfig(name="sdg"), r"^optimizer\.name = 'sdg': not one of timm's optimisers; nearest: .*sgd"),
        (OptimizerConfig(options={"beta": 1}), r"^optimizer\.options\.beta = 1: not an option of sgd"),
        (OptimizerConfig(options={"layer_decay": "a"}), r"^optimizer\.options\.layer_decay = 'a': expected a number"),
        (OptimizerConfig(options={"layer_decay_min_scale": 0.1}), "has a meaning only beside layer_decay"),
        (OptimizerConfig(name="bnbadam"), r"^optimizer\.name = 'bnbadam': cannot be used here"),
    ],
)
def test_what_timm_refuses_is_refused_by_name(config: OptimizerConfig, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        check_optimizer(config)


def test_gradient_norm_is_that_of_all_gradients_together() -> None:
    module = nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 2))
    rng, squares = np.random.default_rng(0), 0.0
    for p in list(module.parameters())[:3]:
        g = rng.normal(size=p.shape).astype(np.float32)
        p.grad, squares = torch.tensor(g), squares + float((g.astype(np.float64) ** 2).sum())
    np.testing.assert_allclose(float(gradient_norm(module.parameters())), math.sqrt(squares), rtol=1e-6)
    module[0].weight.grad[0, 0] = torch.inf
    assert not gradient_norm(module.parameters()).isfinite()


@pytest.mark.parametrize("all_decay", [True, False])
def test_some_modules_may_decay_by_a_rate_of_their_own(all_decay: bool) -> None:
    """One step at a zero gradient: w <- w - lr * decay * w, and biases stay if they do not decay."""
    module = nn.ModuleDict({"network": nn.Linear(3, 2), "fusion": nn.Linear(2, 2)})
    config = OptimizerConfig(name="momentum", lr=0.5, weight_decay=0.1, decay_norm_and_bias=all_decay)
    optimizer = make_optimizer(module, config)
    set_weight_decay(optimizer, module["fusion"].parameters(), 0.01)
    before = {name: p.detach().clone() for name, p in module.named_parameters()}
    for p in module.parameters():
        p.grad = torch.zeros_like(p)
    optimizer.step()
    for name, p in module.named_parameters():
        decay = 0.01 if name.startswith("fusion") else 0.1
        shrunk = 1 - 0.5 * decay if all_decay or name.endswith("weight") else 1.0
        assert torch.allclose(p, before[name] * shrunk, rtol=1e-6, atol=0), name
    assert sum(len(group["params"]) for group in optimizer.param_groups) == 4

"""Optimisers, under timm's names, and the update that a non-finite step skips without asking the host."""

from __future__ import annotations

import difflib
import inspect
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

from engine.cohort.parameter_groups import GROUPING, Said, parameter_groups
from engine.cohort.uncompiled import step, without_compiler
from engine.config import ConfigError, OptimizerConfig

_OF_TORCH: dict[str, tuple[type[torch.optim.Optimizer], dict[str, Any]]] = {
    "sgd": (torch.optim.SGD, {"nesterov": True}),
    "momentum": (torch.optim.SGD, {"nesterov": False}),
    "adam": (torch.optim.Adam, {}),
    "adamw": (torch.optim.AdamW, {}),
}
"""What the commonest of timm's names stand for. A run of these does not wait for timm to be imported."""


def check_optimizer(config: OptimizerConfig) -> None:
    """Refuses what timm does not have. Raises: ConfigError."""
    names = _timm().list_optimizers() if config.name not in _OF_TORCH else ()
    if config.name not in (*_OF_TORCH, *names):
        near = difflib.get_close_matches(config.name, names, n=3) or ["sgd", "momentum", "adamw", "lamb"]
        raise ConfigError(f"optimizer.name = {config.name!r}: not one of timm's optimisers; nearest: {', '.join(near)}")
    try:
        valid = _options(config.name)
    except (AssertionError, ImportError, ValueError) as error:  # of a library that is not there, or wants a GPU
        raise ConfigError(f"optimizer.name = {config.name!r}: cannot be used here: {error}") from None
    for option in config.options:
        if valid and option not in valid:
            # timm drops some that it knows from other optimisers without a word.
            near = difflib.get_close_matches(option, valid, n=1)
            hint = f"; did you mean {near[0]!r}?" if near else ""
            raise ConfigError(
                f"optimizer.options.{option} = {config.options[option]!r}: not an option of {config.name}{hint}; "
                f"it has: {', '.join(valid)}"
            )
    for option in GROUPING:
        value = config.options.get(option, 1)
        if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value <= 1:
            raise ConfigError(f"optimizer.options.{option} = {value!r}: expected a number from 0 to 1")
    if "layer_decay_min_scale" in config.options and "layer_decay" not in config.options:
        raise ConfigError("optimizer.options.layer_decay_min_scale: has a meaning only beside layer_decay")
    try:
        make_optimizer(nn.Linear(1, 1), config)
    except (TypeError, ValueError) as error:
        raise ConfigError(f"optimizer.options = {config.options}: refused by {config.name}: {error}") from None


def _timm() -> Any:
    # Not before it is wanted: it takes longer to import than torch.
    import timm.optim

    return timm.optim


def _class(name: str) -> Any:
    return _OF_TORCH[name][0] if name in _OF_TORCH else _timm().get_optimizer_class(name, bind_defaults=False)


def _options(name: str) -> list[str]:
    """What `optimizer.options` may hold for one of timm's optimisers; empty where its signature does not say."""
    parameters = inspect.signature(_class(name)).parameters
    if any(p.kind is p.VAR_KEYWORD for p in parameters.values()):
        return []
    ours = {"params", "lr", "weight_decay", "momentum", "fused"}
    return sorted({*parameters, *GROUPING} - ours)


def fusible(name: str) -> bool:
    """Whether PyTorch has one of timm's optimisers as one kernel, which also reads on the device whether to skip. For
    another the host has to wait for that in every update."""
    return "fused" in inspect.signature(_class(name)).parameters


def make_optimizer(module: nn.Module, config: OptimizerConfig, said: Said | None = None) -> torch.optim.Optimizer:
    """The optimiser of what of a module is not frozen, fused into one kernel where PyTorch can.

    Args:
        module: a peer, or what peers share.
        config: of the optimiser.
        said: the groups of the networks in it, see `engine.cohort.parameter_groups.said_by`; a whole network is asked
            itself.
    """
    options: dict[str, Any] = {key: value for key, value in config.options.items() if key not in GROUPING}
    if fusible(config.name):
        # Without numbers there are no fused kernels; those that stand in for them take no flag.
        options["foreach" if any(p.is_meta for p in module.parameters()) else "fused"] = True
    without_compiler()
    groups = parameter_groups(module, config, said or {})
    optimizer: torch.optim.Optimizer
    if config.name in _OF_TORCH:
        kind, defaults = _OF_TORCH[config.name]
        if kind is torch.optim.SGD:
            options.setdefault("momentum", config.momentum)
        optimizer = kind(groups, **{"lr": config.lr, "weight_decay": 0.0, **defaults, **options})
    else:
        optimizer = _timm().create_optimizer_v2(
            groups, opt=config.name, lr=config.lr, momentum=config.momentum, **options
        )
    if isinstance(optimizer, torch.optim.SGD):
        # Fused SGD takes its buffers from uninitialised memory at the first update, and keeps them if that is skipped.
        for group in optimizer.param_groups:
            for p in group["params"] if group["momentum"] else ():
                optimizer.state[p]["momentum_buffer"] = torch.zeros_like(p)
    return optimizer


def set_weight_decay(optimizer: torch.optim.Optimizer, parameters: Iterable[nn.Parameter], decay: float) -> None:
    """Gives those of `parameters` that decay at all a weight decay of their own."""
    chosen = {id(p) for p in parameters}
    for group in list(optimizer.param_groups):
        mine = [p for p in group["params"] if id(p) in chosen]
        if not mine or not group["weight_decay"]:
            continue
        group["params"] = [p for p in group["params"] if id(p) not in chosen]
        optimizer.add_param_group({**group, "params": mine, "weight_decay": decay})
    optimizer.param_groups[:] = [group for group in optimizer.param_groups if group["params"]]


def rate_of(optimizer: torch.optim.Optimizer) -> float:
    """The learning rate of the last layers, which no `layer_decay` lowers."""
    group = optimizer.param_groups[0]
    rate: float = group["lr"] / group.get("lr_scale", 1.0)
    return rate


def gradient_norm(parameters: Iterable[nn.Parameter]) -> Tensor:
    """L2 norm of all gradients together; non-finite where one of them is."""
    return torch.nn.utils.get_total_norm([p.grad for p in parameters if p.grad is not None])


def clip_units(parameters: Iterable[nn.Parameter], factor: float) -> None:
    """Adaptive gradient clipping (Brock et al. 2021, arXiv 2102.06171, eq. 3), as timm has it: the gradient G_i of a
    unit, a row of a weight or a whole vector, is scaled to at most `factor` times max(|W_i|, 1e-3)."""
    # Not before it is wanted, as timm is slow to import.
    from timm.utils.agc import adaptive_clip_grad

    adaptive_clip_grad(parameters, factor)


def unscale(optimizer: torch.optim.Optimizer, skip: Tensor, scaler: torch.amp.GradScaler) -> None:
    """Divides gradients by the loss scale, and tells the scaler of an overflow that any rank has met.

    All ranks then skip the same steps and their scales stay equal, so that placement does not change the numbers.
    """
    gradients = (p.grad for group in optimizer.param_groups for p in group["params"] if p.grad is not None)
    # The scaler looks at gradients only, so what was agreed on reaches it as one.
    first = next(gradients)
    first[(0,) * first.ndim].add_(torch.where(skip > 0, torch.inf, 0.0).reshape(()))
    scaler.unscale_(optimizer)


def update(optimizer: torch.optim.Optimizer, skip: Tensor, scaler: torch.amp.GradScaler) -> None:
    """One optimiser step, or none where `skip` [1] (float, on the device) is 1.

    Fused optimisers read the flag on the device. For the others the host has to wait for it.
    """
    if skip.is_meta:
        step(optimizer)
    elif scaler.is_enabled():
        scaler.step(optimizer)
    elif getattr(optimizer, "_step_supports_amp_scaling", False):
        optimizer.found_inf = skip.reshape(())  # type: ignore[attr-defined]
        step(optimizer)
    elif not skip.item():
        step(optimizer)

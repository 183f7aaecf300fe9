"""In which order images, maps and the weights of convolutions lie in memory: channels first, or channels last."""

from __future__ import annotations

import functools
import json
from collections.abc import Collection, Mapping
from typing import TypeVar

import torch
from torch import Tensor, nn

import models
from engine.config import PeerConfig, RunConfig
from models.shapes_alone import dry_run
from models.weightless import weightless

MAPS_A_WEIGHT = 0.5
"""From there on a convolution is faster channels last; `launch/bench layout` shows what comes of it."""

_M = TypeVar("_M", bound=nn.Module)


def channels_first(
    config: RunConfig, peer: PeerConfig, device: torch.device, rows: float, channels: int, image_size: int
) -> Collection[str]:
    """The convolutions of a peer's network that `precision.channels_last: auto` has lie channels first.

    On a CPU channels-last memory saves what kernels would otherwise do to reorder maps, and costs what they and a fused
    optimiser do to reorder weights and their gradients. So those lie first that in a pass go through less than
    `MAPS_A_WEIGHT` numbers of maps for each of their weights: the wide ones at the end, on small maps of few rows.

    Args:
        config: of the run.
        peer: whose network it is.
        device: of the network.
        rows: of a pass, in the mean over ranks: those that hold the same peer must choose alike.
        channels: of the images, which are `image_size` pixels wide.
    """
    if config.precision.channels_last != "auto" or device.type != "cpu":
        return ()
    try:
        found = maps_a_weight(peer.network, json.dumps(peer.options, sort_keys=True, default=str), channels, image_size)
    except (RuntimeError, ValueError, TypeError, AssertionError):
        return ()  # A network that does not take such images says so in its first step.
    return {name for name, maps in found.items() if rows * maps < MAPS_A_WEIGHT}


@functools.cache
def maps_a_weight(network: str, options: str, channels: int, side: int) -> Mapping[str, float]:
    """Of each convolution of a network: numbers that it reads and writes in a pass of one image, over its weights.

    Args:
        network: its name.
        options: of it, as JSON.
        channels: of the image, which is `side` pixels wide.
    """
    with weightless(network):
        module = models.create(network, 10, channels, **json.loads(options)).to("meta")
    rows = 2  # BatchNorm in training wants more than one
    found: dict[str, float] = {}

    def seen(name: str, convolution: nn.Conv2d, inputs: tuple[Tensor], output: Tensor) -> None:
        maps = (inputs[0].numel() + output.numel()) / rows
        found[name] = found.get(name, 0.0) + maps / convolution.weight.numel()

    for name, part in module.named_modules():
        if isinstance(part, nn.Conv2d):
            part.register_forward_hook(functools.partial(seen, name))
    dry_run(module, torch.empty(rows, channels, side, side, device="meta"))
    return found


def placed(module: _M, device: torch.device, *, last: bool, first: Collection[str] = ()) -> _M:
    """The module on a device, and in a layout of memory.

    Args:
        module: of which nothing but that changes.
        last: whether convolutions lie channels last, and
        first: those that do not all the same.
    """
    layout = torch.channels_last if last else torch.contiguous_format
    module = module.to(device, memory_format=layout)  # type: ignore[call-overload]
    for name, part in module.named_modules():
        if isinstance(part, nn.Conv2d) and (not last or name in first):
            part.to(memory_format=torch.contiguous_format)
            part.register_forward_pre_hook(_first)
    return module


def _first(_: nn.Module, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    """A convolution would have its weights follow maps that lie otherwise, in each pass."""
    return (inputs[0].contiguous(), *inputs[1:])

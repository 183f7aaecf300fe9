"""In which order images, maps and the weights of convolutions lie in memory: channels first, or channels last."""

from __future__ import annotations

import functools
import json
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

import models
from engine.config import RunConfig
from engine.ranks.placement import Placement
from models.shapes_alone import shapes_alone
from models.weightless import weightless

MAPS_A_WEIGHT = 1.5
"""Between networks that `launch/bench layout` shows to be faster either way."""


def layout_of(
    config: RunConfig, placement: Placement, device: torch.device, channels: int, image_size: int
) -> torch.memory_format:
    """What `precision.channels_last` says, the same on all ranks.

    `auto`: channels last on GPUs. On a CPU that saves what kernels would otherwise do to reorder maps, and costs what
    they do to reorder weights and their gradients: it is taken where convolutions go through `MAPS_A_WEIGHT` numbers of
    maps in a pass for each of their weights, or more.

    Args:
        config: of the run.
        placement: of any rank.
        device: of the networks.
        channels: of the images, which are `image_size` pixels wide.
    """
    wanted = config.precision.channels_last
    if wanted == "auto":
        wanted = device.type != "cpu" or _maps_outweigh(config, placement, channels, image_size)
    return torch.channels_last if wanted else torch.contiguous_format


def layout_of_weights(networks: Iterable[nn.Module]) -> torch.memory_format:
    """That of networks which have been built; their convolutions take images of no other without a copy of weights."""
    weights = (p for network in networks for p in network.parameters() if p.ndim == 4)
    last = any(not p.is_contiguous() and p.is_contiguous(memory_format=torch.channels_last) for p in weights)
    return torch.channels_last if last else torch.contiguous_format


def _maps_outweigh(config: RunConfig, placement: Placement, channels: int, image_size: int) -> bool:
    rows = config.data.global_batch / config.train.accumulation / placement.mean_replicas
    try:
        counts = [_of_convolutions(peer.network, _key(peer.options), channels, image_size) for _, peer in config.cohort]
    except (RuntimeError, ValueError, TypeError, AssertionError):
        return True  # A network that does not take such images says so in its first step.
    maps, weights = (sum(each) for each in zip(*counts, strict=True))
    return rows * maps >= MAPS_A_WEIGHT * weights


def maps_a_weight(network: str, options: Mapping[str, Any], channels: int, side: int) -> float:
    """Numbers that convolutions read and write in a pass of one image, for each of their weights."""
    maps, weights = _of_convolutions(network, _key(options), channels, side)
    return maps / weights


def _key(options: Mapping[str, Any]) -> str:
    return json.dumps(options, sort_keys=True, default=str)


@functools.cache
def _of_convolutions(network: str, options: str, channels: int, side: int) -> tuple[int, int]:
    """Numbers of the maps of one image that all convolutions of a network read and write, and of their weights."""
    with weightless(network):
        module = models.create(network, 10, channels, **json.loads(options)).to("meta")
    maps = weights = 0

    def seen(convolution: nn.Module, inputs: tuple[Tensor], output: Tensor) -> None:
        nonlocal maps, weights
        assert isinstance(convolution, nn.Conv2d)
        maps, weights = maps + inputs[0].numel() + output.numel(), weights + convolution.weight.numel()

    for part in module.modules():
        if isinstance(part, nn.Conv2d):
            part.register_forward_hook(seen)
    rows = 2  # BatchNorm in training wants more than one
    with shapes_alone(), torch.no_grad():
        module(torch.empty(rows, channels, side, side, device="meta"))
    return maps // rows, weights

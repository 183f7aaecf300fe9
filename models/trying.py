"""Whether a network takes images."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from models.errors import first_line
from models.registry import create
from models.shapes_alone import dry_run
from models.weightless import weightless

_SIZE_OPTIONS = ("img_size", "image_size")

_SMALL = 64
"""Pixels up to which a network of ours is tried as it is: quicker than without numbers, for which PyTorch imports its
compiler first."""

_ENOUGH = 2
"""Images that a pass has at most: what takes two takes more."""


def try_images(
    name: str, options: Mapping[str, Any], *, num_classes: int, in_channels: int, side: int, count: int
) -> None:
    """Makes a forward pass in training mode, of large networks on shapes alone; the random state stays as it is.

    Args:
        name: as of `create`.
        options: of the network.
        num_classes: outputs of the classifier.
        in_channels: channels of the images.
        side: of the images, in pixels.
        count: images of one pass.

    Raises:
        ValueError: it takes no such images, or not so few, or gives something else than logits; names what would do.
    """
    network = _outline(name, options, num_classes, in_channels, side)
    reason = _refusal(network, num_classes, in_channels, side, count)
    if reason is None:
        return
    for option in _SIZE_OPTIONS:
        if option in inspect.signature(type(network)).parameters and options.get(option) != side:
            try:
                wanted = _outline(name, {**options, option: side}, num_classes, in_channels, side)
                fits = _refusal(wanted, num_classes, in_channels, side, count)
            except ValueError:
                break
            if fits is None:
                raise ValueError(f"takes no images of {side} pixels as it is; expected options: {{{option}: {side}}}")
    if count == 1 and _refusal(network, num_classes, in_channels, side, 2) is None:
        raise ValueError(f"cannot be trained on 1 image at a time: {reason}; expected 2 or more on each rank")
    raise ValueError(f"cannot be trained on images of {side} pixels: {reason}{_usual(network)}")


def _usual(network: nn.Module) -> str:
    """The size that a network of timm was made for."""
    config = getattr(network, "pretrained_cfg", None) or {}
    size = config.get("input_size")
    return f"; it was made for {size[-1]} pixels" if size else ""


def _outline(name: str, options: Mapping[str, Any], num_classes: int, in_channels: int, side: int) -> nn.Module:
    if "/" not in name and side <= _SMALL:
        with torch.random.fork_rng(devices=[]):
            return create(name, num_classes, in_channels, **options).train()
    with weightless(name):
        return create(name, num_classes, in_channels, **options).to("meta").train()


def _refusal(network: nn.Module, num_classes: int, in_channels: int, side: int, count: int) -> str | None:
    """Why a pass cannot be made; None also where shapes alone do not tell."""
    device = next((x.device for x in network.parameters()), torch.device("meta"))
    count = min(count, _ENOUGH)
    images = torch.zeros(count, in_channels, side, side, device=device)
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        try:
            given = dry_run(network, images) if device.type == "meta" else network(images)
        except (RuntimeError, ValueError, TypeError, AssertionError, IndexError, ZeroDivisionError) as error:
            without_numbers = isinstance(error, NotImplementedError) or "meta" in str(error).lower()
            return None if without_numbers else first_line(error) or type(error).__name__
    if not isinstance(given, Tensor):
        return f"it gives a {type(given).__name__} instead of logits in training, with outputs that nothing learns from"
    wanted = [count, num_classes]
    return None if list(given.shape) == wanted else f"it gives {list(given.shape)} and not logits {wanted}"

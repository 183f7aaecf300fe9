"""What a step of a peer costs beside one of another, counted without numbers."""

from __future__ import annotations

import functools
import json

import torch

import models
from engine.config import ConfigError, RunConfig
from models.shapes_alone import dry_run
from models.weightless import weightless


def costs_of(config: RunConfig) -> list[float]:
    """Floating-point operations of a step of each of the K peers, for one image: a pass forward, and a way back that
    takes twice as many; of a frozen peer the pass forward alone.

    Raises:
        ConfigError: a network does not take the images.
    """
    data = config.data
    found = []
    for name, peer in config.cohort:
        try:
            options = json.dumps(peer.options, sort_keys=True, default=str)
            passes = 3 if peer.learns else 1
            found.append(float(passes * _forward(peer.network, options, data.channels, data.side)))
        except (RuntimeError, ValueError, TypeError) as error:
            reason = str(error).strip().partition("\n")[0]
            raise ConfigError(
                f"placement.kind = balanced: what {name} costs on images of {data.side} pixels cannot be counted: "
                f"{reason}; expected placement.ranks, the ranks of each peer"
            ) from None
    return found


@functools.cache
def _forward(network: str, options: str, channels: int, side: int) -> int:
    """Of one image."""
    from torch.utils.flop_counter import FlopCounterMode  # brings triton along, which most runs have no use for

    with weightless(network):
        module = models.create(network, 10, channels, **json.loads(options)).to("meta")
    rows = 2  # BatchNorm in training wants more than one
    with FlopCounterMode(display=False) as counter:
        dry_run(module, torch.empty(rows, channels, side, side, device="meta"))
    return counter.get_total_flops() // rows

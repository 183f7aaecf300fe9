"""What a peer's part of a step does to a device, operation by operation, counted without numbers."""

from __future__ import annotations

import functools
import json
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import models
from engine.config import PeerConfig, RunConfig
from engine.ranks.planning.hardware import COMPILED, COPIES, DISPATCH, KERNELS, PRODUCTS, Gpu
from models.shapes_alone import shapes_alone
from models.weightless import weightless

_Table = NDArray[np.float64]


@dataclass(frozen=True)
class Footprint:
    """Of one peer. Tables have a row for each operation."""

    flops: _Table
    """For one image; a multiply-add counts two."""
    fixed: _Table
    """Bytes read and written, whatever the number of images, and"""
    moved: _Table
    """for each image."""
    forward: int
    """How many of the operations are the pass forward."""
    parameters: int
    """Numbers that learn."""
    half: bool
    """Whether products are of 16-bit numbers."""

    def seconds(self, rows: int, gpu: Gpu, *, tf32: bool, compiled: bool) -> tuple[float, float]:
        """Forward and backward with the update, of so many images: for each operation whichever takes longer, its
        products or its bytes; and at least as long as the host takes to ask for them all."""
        rate = PRODUCTS * (gpu.half if self.half else gpu.tf32 if tf32 else gpu.float32)
        device = np.maximum(self.flops * rows / rate, (self.fixed + self.moved * rows) / (COPIES * gpu.bandwidth))
        factor = KERNELS * (COMPILED if compiled else 1.0)
        parts = (slice(None, self.forward), slice(self.forward, None))
        host = [DISPATCH * len(device[part]) for part in parts]
        there, back = (max(float(device[part].sum()) * factor, busy) for part, busy in zip(parts, host, strict=True))
        return there, back


def footprint_of(config: RunConfig, peer: PeerConfig, classes: int) -> Footprint:
    """Counts a peer's network: forward, backward and update, or forward alone of one that is frozen. Its head, the
    objective and an outer step are not counted.

    Raises:
        ValueError: it does not take such images; also RuntimeError or TypeError, as the network has it.
    """
    options = json.dumps(peer.options, sort_keys=True, default=str)
    state = 28 if "adam" in config.optimizer_of(peer).name or "lamb" in config.optimizer_of(peer).name else 20
    half = config.precision.amp != "float32"
    return _count(peer.network, options, config.data.channels, config.data.side, classes, peer.learns, half, state)


@functools.cache
def _count(
    network: str, options: str, channels: int, side: int, classes: int, learns: bool, half: bool, state: int
) -> Footprint:
    dtype = torch.bfloat16 if half else torch.float32
    with weightless(network):
        module = models.create(network, classes, channels, **json.loads(options)).to("meta", dtype)
    module.train(learns).requires_grad_(learns)
    with shapes_alone():
        two, four = (
            _watched(module, torch.empty(rows, channels, side, side, device="meta", dtype=dtype)) for rows in (2, 4)
        )
    flops, few, many, forward = two[0], two[1], four[1], two[2]
    moved = (many - few) / 2
    parameters = sum(p.numel() for p in module.parameters() if p.requires_grad)
    # An update reads weights, gradients and what the optimiser remembers, and writes all but the gradients.
    fixed = np.append(few - 2 * moved, parameters * float(state))
    return Footprint(np.append(flops / 2, 0.0), fixed, np.append(moved, 0.0), forward, parameters, half)


def _watched(module: torch.nn.Module, images: Tensor) -> tuple[_Table, _Table, int]:
    """FLOPs and bytes of each operation that moves any, and the number of those forward."""
    with _Operations() as seen:
        logits = module(images)
        forward = len(seen.bytes)
        if logits.requires_grad:
            logits.float().sum().backward()
    module.zero_grad(set_to_none=True)
    return np.array(seen.flops), np.array(seen.bytes), forward


class _Operations(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        # Imported here as it brings triton along, which most runs have no use for.
        from torch.utils.flop_counter import flop_registry

        self._formulas = flop_registry
        self.flops: list[float] = []
        self.bytes: list[float] = []

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        """Nothing here is compiled, and torch need not import its compiler to hear so."""
        return False

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = function(*args, **(kwargs or {}))
        if not _is_view(function):
            count = self._formulas.get(function._overloadpacket, _nothing)(*args, **(kwargs or {}), out_val=result)
            tensors = [x for x in tree_leaves((args, kwargs, result)) if isinstance(x, Tensor)]
            self.flops.append(float(count))
            self.bytes.append(float(sum(x.numel() * x.element_size() for x in tensors)))
        return result


def _nothing(*_: object, **__: object) -> int:
    return 0


def _is_view(function: Any) -> bool:
    """Whether an operation gives what it was given, in another shape."""
    results = [each.alias_info for each in function._schema.returns]
    return any(info is not None and not info.is_write for info in results)

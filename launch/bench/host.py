"""What a step costs the host: how many operations it dispatches, and how long the host is busy with them."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode


class _Count(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.operations = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.operations += 1
        return func(*args, **(kwargs or {}))


def operations(step: Callable[[], object]) -> int:
    """Operations that one step dispatches, forward, backward and update: a count, the same each time."""
    with _Count() as count:
        step()
    return count.operations


def host_seconds(step: Callable[[], object], device: torch.device) -> float:
    """Seconds until a step has been handed to an idle device; on a CPU, until it is done."""
    if device.type == "cuda":
        torch.cuda.synchronize()
    begin = time.perf_counter()
    step()
    seconds = time.perf_counter() - begin
    if device.type == "cuda":
        torch.cuda.synchronize()
    return seconds

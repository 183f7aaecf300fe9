"""What a step costs: operations that it dispatches, bytes that it makes, and how long the host is busy with them."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class _Count(TorchDispatchMode):
    def __init__(self, counts: Callable[[Any], bool]) -> None:
        super().__init__()
        self._counts, self.operations = counts, 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.operations += self._counts(func)
        return func(*args, **(kwargs or {}))


def operations(step: Callable[[], object]) -> int:
    """Operations that one step dispatches, forward, backward and update: a count, the same each time."""
    with _Count(lambda func: True) as count:
        step()
    return count.operations


def computing_operations(step: Callable[[], object]) -> int:
    """Those without views and without room that is made: on a GPU, kernels."""
    with _Count(lambda func: not (func.is_view or "empty" in str(func) or "profiler" in str(func))) as count:
        step()
    return count.operations


class _Made(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.bytes = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        found = func(*args, **(kwargs or {}))
        given = {x.untyped_storage().data_ptr() for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor)}
        for x in tree_leaves(found):
            if isinstance(x, Tensor) and x.untyped_storage().data_ptr() not in given:
                self.bytes += x.untyped_storage().nbytes()
        return found


def bytes_made(step: Callable[[], object]) -> int:
    """Of all tensors that a step makes, whether they live on or not."""
    with _Made() as made:
        step()
    return made.bytes


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

"""How this process computes: kernels, TF32, the compiler's limits, and the number format of the networks."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.overrides import TorchFunctionMode

from engine.cohort.compiling import set_compiler
from engine.config import RunConfig

AUTOCAST = {"float32": None, "bf16": torch.bfloat16, "fp16": torch.float16}
"""What networks compute in, by `precision.amp`; None is as their weights are."""


def set_precision(config: RunConfig, device: torch.device) -> None:
    """For all networks of this process, before the first is built."""
    if config.precision.compile:
        set_compiler(3 * len(config.cohort), device)
    if device.type == "cuda":
        torch.backends.cudnn.benchmark = True
        torch.backends.cudnn.allow_tf32 = config.precision.tf32
        torch.set_float32_matmul_precision("high" if config.precision.tf32 else "highest")


@contextlib.contextmanager
def capturable(config: RunConfig, device: torch.device) -> Iterator[None]:
    """What is built within can be captured (`precision.graphs`): DDP adds gradients up on the stream on which it was
    made, and no graph takes anything from the default one."""
    if device.type != "cuda" or config.precision.graphs == "off" or dist.get_world_size() == 1:
        yield
        return
    stream = torch.cuda.Stream(device)
    with torch.cuda.stream(stream):
        yield
    torch.cuda.current_stream(device).wait_stream(stream)


def autocast(device: torch.device, dtype: torch.dtype | None) -> contextlib.AbstractContextManager[Any]:
    """Networks compute in a shorter number format within; `dtype` None leaves them as they are."""
    if dtype is None:
        return contextlib.nullcontext()
    # Tensors without numbers have no autocast of their own, and must take as much room as real ones.
    return _CastOnMeta(dtype) if device.type == "meta" else torch.autocast(device.type, dtype=dtype)


@contextlib.contextmanager
def exact_products(device: torch.device) -> Iterator[None]:
    """Products of float32 matrices are exact within, whatever `precision.tf32` says of networks.

    Products of embeddings are divided by a small temperature: with TF32's ten bits KL(x, x) would not be 0.
    """
    if device.type != "cuda":
        yield
        return
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)


_CAST = {
    torch.conv2d,
    torch.nn.functional.linear,
    torch.nn.functional.scaled_dot_product_attention,
    torch.matmul,
    torch.bmm,
    torch.einsum,
    Tensor.matmul,
    Tensor.__matmul__,
    Tensor.bmm,
}


class _CastOnMeta(TorchFunctionMode):
    """Does what autocast does to convolutions and products of matrices, which is where activations get their format."""

    def __init__(self, dtype: torch.dtype) -> None:
        super().__init__()
        self._dtype = dtype

    def __torch_function__(
        self, function: Callable[..., Any], types: Sequence[type], args: Sequence[Any] = (), kwargs: Any = None
    ) -> Any:
        if function in _CAST:
            args = torch.utils._pytree.tree_map(self._cast, tuple(args))
            kwargs = torch.utils._pytree.tree_map(self._cast, kwargs or {})
        return function(*args, **(kwargs or {}))

    def _cast(self, value: Any) -> Any:
        return value.to(self._dtype) if isinstance(value, Tensor) and value.dtype == torch.float32 else value

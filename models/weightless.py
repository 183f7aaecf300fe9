"""Building a network to look at it, without memory for its weights."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

_DRAWS = {Tensor.normal_, Tensor.uniform_}


class _NothingDrawn(TorchFunctionMode):
    """Weights without numbers are not drawn: PyTorch would do it step by step in Python, and import its compiler."""

    def __torch_function__(
        self, func: Callable[..., Any], types: Sequence[type], args: Sequence[Any] = (), kwargs: Any = None
    ) -> Any:
        if func in _DRAWS and args[0].is_meta:
            return args[0]
        return func(*args, **(kwargs or {}))


class _EmptyOnMeta(TorchFunctionMode):
    def __torch_function__(
        self, func: Callable[..., Any], types: Sequence[type], args: Sequence[Any] = (), kwargs: Any = None
    ) -> Any:
        kwargs = dict(kwargs or {})
        if func is torch.empty:
            kwargs["device"] = "meta"
        return func(*args, **kwargs)


@contextmanager
def weightless(name: str) -> Iterator[None]:
    """Build the network `name` on the meta device within this context; the random state is restored at its end.

    Of torchvision's networks only what `torch.empty` makes goes there, that is the weights of layers: its RegNets
    compute their widths with tensors, which must be real. timm's hybrid networks, in turn, run a forward pass while
    they are built, so there all must be on one device.
    """
    on_meta = _EmptyOnMeta() if name.startswith("torchvision/") else torch.device("meta")
    with torch.random.fork_rng(devices=[]), on_meta, _NothingDrawn():
        yield

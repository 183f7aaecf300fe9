"""Optimisers and outer steps without torch's compiler, which takes as long to import as torch itself.

torch imports it when an optimiser is first used, only to say that it is to be left out of compiled graphs. Where
nothing is compiled there is nothing to say. What is done here changes no number, and where a version of torch is
written in another way, it does nothing.
"""

from __future__ import annotations

import contextlib
import inspect
import sys
from contextlib import AbstractContextManager

import torch


def without_compiler() -> None:
    """Has the methods of optimisers called as they are."""
    if "torch._dynamo" not in sys.modules:
        for method in vars(torch.optim.Optimizer).values():
            if hasattr(method, "__wrapped__"):
                # Where torch keeps what the compiler has made of it.
                vars(method.__wrapped__).setdefault("__dynamo_disable", method.__wrapped__)


def step(optimizer: torch.optim.Optimizer) -> None:
    """One update."""
    if "torch._dynamo" in sys.modules or not type(optimizer).__module__.startswith("torch."):
        optimizer.step()
        return
    with torch.no_grad():
        inspect.unwrap(type(optimizer).step)(optimizer)


def eagerly() -> AbstractContextManager[object]:
    """Within this context networks that were compiled are computed as they are."""
    return torch.compiler.set_stance("force_eager") if "torch._dynamo" in sys.modules else contextlib.nullcontext()

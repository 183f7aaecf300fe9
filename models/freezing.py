"""Parts of a network that stay as they are."""

from __future__ import annotations

import difflib
from collections.abc import Sequence
from fnmatch import fnmatchcase
from typing import Any

from torch import nn
from torch.nn.modules.batchnorm import _NormBase


def freeze(network: nn.Module, patterns: Sequence[str]) -> None:
    """Takes parameters out of learning, and holds the running statistics of BatchNorm layers that are wholly frozen.

    Args:
        network: whose parameters are told by name.
        patterns: shell patterns of names (`blocks.[01].*`), or the names of submodules (`layer1`).

    Raises:
        ValueError: a pattern fits no parameter, or nothing would be left to learn.
    """
    names = [name for name, _ in network.named_parameters()]
    frozen: set[str] = set()
    for pattern in patterns:
        fitting = {name for name in names if fnmatchcase(name, pattern) or name.startswith(f"{pattern}.")}
        if not fitting:
            parts = [name for name, _ in network.named_modules() if name] + names
            near = difflib.get_close_matches(pattern, parts, n=3) or [name for name, _ in network.named_children()]
            raise ValueError(f"frozen {pattern!r}: fits no parameter; nearest: {', '.join(near)}")
        frozen |= fitting
    if frozen and len(frozen) == len(names):
        raise ValueError(f"frozen {list(patterns)}: nothing of the network is left to learn; expected a part of it")
    for name, parameter in network.named_parameters():
        if name in frozen:
            parameter.requires_grad_(False)
    for module in network.modules():
        own = list(module.parameters(recurse=False))
        if isinstance(module, _NormBase) and own and not any(p.requires_grad for p in own):
            module.register_forward_pre_hook(_stay_in_evaluation)


def _stay_in_evaluation(module: nn.Module, _: Any) -> None:
    # Whoever sets the network to training does not know of it.
    module.training = False

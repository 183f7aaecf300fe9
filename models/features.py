"""What a built network says about itself: where its pooled feature is, how many parameters it has."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, cast

from torch import nn


def parameter_count(network: nn.Module) -> int:
    """The number of scalars in all parameters of `network`; buffers, such as running statistics, do not count."""
    return sum(parameter.numel() for parameter in network.parameters())


def pooled_features(network: nn.Module) -> tuple[str, int]:
    """Where the pooled feature [n, D] of a network is: it is the input of the classifier.

    A network of ours may name the module that it goes into, such as a classifier of several layers, in
    `network.pooled`. Else it is found inside what timm's `get_classifier()` gives where the network has that, and else
    in the whole network: the last `nn.Linear` with `network.num_classes` outputs.

    Args:
        network: a network from `create`, or any module with one linear classifier at its end.

    Returns:
        The classifier's name for `network.get_submodule`, and D.

    Raises:
        ValueError: the network's classifier is not linear, or there are several.
    """
    own = getattr(network, "pooled", None)
    if isinstance(own, str):
        first = next(module for module in network.get_submodule(own).modules() if isinstance(module, nn.Linear))
        return own, first.in_features
    head: Any = network
    if hasattr(network, "get_classifier"):
        head = cast("Callable[[], Any]", network.get_classifier)()
    classes = getattr(network, "num_classes", None)
    linears = [
        module
        for module in (head.modules() if isinstance(head, nn.Module) else ())
        if isinstance(module, nn.Linear) and classes in (None, module.out_features)
    ]
    if not linears or (head is not network and len(linears) > 1):
        what = "" if head is network else f" is {_describe(head)} and"
        raise ValueError(
            f"{type(network).__name__}: no pooled feature to take, for its classifier{what} has {len(linears)} "
            f"nn.Linear with {classes} outputs; expected 1"
        )
    name = next(name for name, module in network.named_modules() if module is linears[-1])
    return name, linears[-1].in_features


def classifier_weights(network: nn.Module) -> list[nn.Parameter]:
    """The parameters of a network's classifier: what timm's `get_classifier()` gives, or the linear layer that the
    pooled feature goes into; none where it has neither."""
    if hasattr(network, "get_classifier"):
        found = cast("Callable[[], Any]", network.get_classifier)()
        parts = found if isinstance(found, (tuple, list)) else [found]
        return [p for part in parts if isinstance(part, nn.Module) for p in part.parameters()]
    try:
        name, _ = pooled_features(network)
    except ValueError:
        return []
    return list(network.get_submodule(name).parameters())


def _describe(head: Any) -> str:
    if isinstance(head, (tuple, list)):
        return f"({', '.join(type(part).__name__ for part in head)})"
    return type(head).__name__

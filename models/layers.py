"""What our networks are made of in common: the straight network, and how its weights start."""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

import torch
from torch import Tensor, nn


class Straight(nn.Module):
    """A network that is its children, one after the other in the order of their definition.

    So a network that is cut after a child is a trunk and a branch, and every weight keeps its name. Pooling,
    activations and flattening are children too; none works in place, for what a tap shows must stay as it was.
    """

    stages: tuple[str, ...] = ()
    """The submodules whose outputs are the feature maps of stage 1, 2, ..., as the papers tap them."""

    def __init__(self, num_classes: int) -> None:
        super().__init__()
        self.num_classes = num_classes

    def forward(self, x: Tensor) -> Tensor:
        """Images [n, in_channels, h, w] to logits [n, num_classes]."""
        for child in self.children():
            x = child(x)
        return x


def stage(block: Callable[[int, int, int], nn.Module], inputs: int, outputs: int, stride: int, n: int) -> nn.Sequential:
    """`n` blocks, the first with the stride and the change of channels; `block(inputs, outputs, stride)` makes one."""
    return nn.Sequential(block(inputs, outputs, stride), *(block(outputs, outputs, 1) for _ in range(n - 1)))


def kaiming_convolutions(network: nn.Module, mode: Literal["fan_in", "fan_out"] = "fan_out") -> None:
    """Draw all convolutions from a normal of std sqrt(2 / fan); fan_out is k k out_channels."""
    for module in network.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight, mode=mode, nonlinearity="relu")


def probability(option: str, value: object) -> float:
    """`value`, where it is a probability that leaves something over.

    Raises:
        ValueError: it is no number in [0, 1); names the option.
    """
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 <= value < 1:
        raise ValueError(f"option {option!r} is {value!r}; expected a number from 0 up to, not including, 1")
    return value


def positive(option: str, value: object) -> int:
    """`value`, where it is a positive integer.

    Raises:
        ValueError: it is not; names the option.
    """
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise ValueError(f"option {option!r} is {value!r}; expected a positive integer")
    return value


def shuffle(x: Tensor, groups: int) -> Tensor:
    """Channel shuffle: channel i of group j, out of n / groups, goes to place i groups + j. [b, n, h, w] stays so."""
    b, n, h, w = x.shape
    return torch.reshape(x.view(b, groups, n // groups, h, w).transpose(1, 2), (b, n, h, w))

"""Buffers, above all BatchNorm statistics: what a skipped step must not leave behind, and their mean over ranks."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
import torch.distributed as dist
from torch import Tensor, nn

from losses.functional import fill, flat


class Remembered:
    """What a step may change beside parameters, as it was when the step began.

    Statistics would keep the non-finite values of a skipped step for ever. Which buffers change is asked when a step
    begins, so modules may be built, moved and prepared in any order before.

    Args:
        modules: of them all buffers that are saved; the others are constants, or tables that look after themselves.
    """

    def __init__(self, modules: Iterable[nn.Module]) -> None:
        self._modules = list(modules)
        self._before: list[tuple[list[Tensor], Tensor]] = []

    def begin(self) -> None:
        """Remembers what stands in the buffers."""
        if not self._before:
            buffers = _saved_buffers(self._modules)
            kinds = {(b.dtype, b.device): None for b in buffers}
            self._before = [([b for b in buffers if (b.dtype, b.device) == kind], torch.empty(0)) for kind in kinds]
        self._before = [(buffers, flat(buffers)) for buffers, _ in self._before]

    def restore(self, skip: Tensor) -> None:
        """Puts back what was remembered where `skip` [1] is 1, without asking the host."""
        for buffers, before in self._before:
            fill(buffers, torch.where(skip > 0, before, flat(buffers)))


def _saved_buffers(modules: Iterable[nn.Module]) -> list[Tensor]:
    inner = dict.fromkeys(module for whole in modules for module in whole.modules())
    return [
        b.data
        for module in inner
        for name, b in module.named_buffers(recurse=False)
        if name not in module._non_persistent_buffers_set
    ]


def floats(modules: Iterable[nn.Module]) -> list[Tensor]:
    """The buffers of modules that hold numbers which can be averaged."""
    # .data: autograd has BatchNorm's statistics among what it keeps, and would take a later write for a mistake.
    return [b.data for module in modules for b in module.buffers() if b.is_floating_point()]


def average(buffers: Sequence[Tensor], group: dist.ProcessGroup | None) -> None:
    """The mean over the ranks of a group, in place: one all-reduce, or none where the group is one rank."""
    if buffers and group is not None and group.size() > 1:
        row = flat(buffers)
        dist.all_reduce(row, group=group)
        fill(buffers, row / group.size())

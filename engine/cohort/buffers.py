"""Buffers, above all BatchNorm statistics: what a skipped step must not leave behind, and their mean over ranks."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator, Sequence

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from engine.ranks.placement import Placement
from losses.functional import fill, flat


@contextlib.contextmanager
def statistics_stay(modules: Iterable[nn.Module]) -> Iterator[None]:
    """BatchNorm in training goes on normalising by its batch, and does not move its running statistics."""
    inner = [layer for module in modules for layer in module.modules()]
    layers = [layer for layer in inner if isinstance(layer, _BatchNorm) and layer.track_running_stats]
    for layer in layers:
        layer.track_running_stats = False
    try:
        yield
    finally:
        for layer in layers:
            layer.track_running_stats = True


class Remembered:
    """What a step may change beside parameters, as it was when the step began.

    Statistics would keep the non-finite values of a skipped step for ever. Which buffers change is asked when the first
    step begins, so modules may be built, moved and prepared in any order before.

    Args:
        modules: of them all buffers that are saved; the others are constants, or tables that look after themselves.
    """

    def __init__(self, modules: Iterable[nn.Module]) -> None:
        self._modules = list(modules)
        # Of each number format, the buffers as rows: hundreds of small tensors are then one operation, not one each.
        self._rows: list[list[Tensor]] | None = None
        self._before: list[Tensor] = []

    def begin(self) -> None:
        """Remembers what stands in the buffers."""
        if self._rows is None:
            rows = [_row(b) for b in _saved_buffers(self._modules)]
            self._rows = [[row for row in rows if row.dtype == dtype] for dtype in {row.dtype: None for row in rows}]
        self._before = [flat(rows) for rows in self._rows]

    def restore(self, skip: Tensor) -> None:
        """Puts back what was remembered where `skip` [1] is 1, without asking the host."""
        skipped = skip > 0
        for rows, before in zip(self._rows or (), self._before, strict=True):
            fill(rows, torch.where(skipped, before, flat(rows)))


def _saved_buffers(modules: Iterable[nn.Module]) -> list[Tensor]:
    inner = dict.fromkeys(module for whole in modules for module in whole.modules())
    return [
        b.data
        for module in inner
        for name, b in module.named_buffers(recurse=False)
        if name not in module._non_persistent_buffers_set
    ]


def _row(buffer: Tensor) -> Tensor:
    """A view of all elements in the order in which they lie in memory."""
    return buffer.permute(sorted(range(buffer.ndim), key=buffer.stride, reverse=True)).view(-1)


def floats(modules: Iterable[nn.Module]) -> list[Tensor]:
    """The buffers of modules that hold numbers which can be averaged."""
    # .data: autograd has BatchNorm's statistics among what it keeps, and would take a later write for a mistake.
    return [b.data for module in modules for b in module.buffers() if b.is_floating_point()]


def average(parts: Sequence[tuple[Sequence[Tensor], float]], group: dist.ProcessGroup | None) -> None:
    """The mean over the ranks of a group, in place: one all-reduce, or none where the group is one rank.

    Args:
        parts: buffers, and what this rank's count, which is 1 in the mean over the ranks.
    """
    buffers = [b for own, _ in parts for b in own]
    if buffers and group is not None and group.size() > 1:
        row = flat([b if weight == 1 else b * weight for own, weight in parts for b in own])
        dist.all_reduce(row, group=group)
        fill(buffers, row / group.size())


def average_statistics(
    own: Iterable[nn.Module],
    trunk: Iterable[nn.Module],
    shared: Iterable[nn.Module],
    placement: Placement,
    replica_group: dist.ProcessGroup,
    rows: int,
    batch: int,
) -> None:
    """BatchNorm statistics over all rows: one all-reduce in each replica group, and one over the world.

    Args:
        own: modules of the peers that live here.
        trunk: that all peers share. Its statistics are of the views of the peers here, and count by the peers.
        shared: other modules that all peers share.
        placement: of this rank.
        replica_group: its replicas.
        rows: that this rank has of a global batch of
        batch: rows.
    """
    of_rank = rows * placement.mean_replicas / batch
    of_peers = len(placement.residents) * len(placement.groups) / len(placement.peers)
    average([(floats(own), rows * placement.replicas / batch)], replica_group)
    average([(floats(trunk), of_rank * of_peers), (floats(shared), of_rank)], dist.group.WORLD)

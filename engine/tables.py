"""Tables that all ranks read and write alike: whole on every rank, or each rank with a part of the rows."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.distributed as dist
from torch import Tensor, nn

from data_pipelines.order import part


class Table(nn.Module):
    """All rows on every rank.

    Args:
        rows: what stands there at first, [n, d].
    """

    rows: Tensor

    def __init__(self, rows: Tensor) -> None:
        super().__init__()
        self.register_buffer("rows", rows)

    def read(self, ids: Tensor) -> Tensor:
        """See `losses.contract.Table`."""
        # index_select: faster than indexing on a CPU, and the same on a GPU.
        return self.rows.index_select(0, ids.flatten()).float().view(*ids.shape, -1)

    def write(self, ids: Tensor, rows: Tensor) -> None:
        """See `losses.contract.Table`."""
        self.rows.index_copy_(0, ids, rows.to(self.rows.dtype))


class ShardedTable(nn.Module):
    """Consecutive rows on each rank of the world, the others' asked for when they are read.

    Args:
        size: n, rows of all ranks together.
        rows: those of this rank at first, `part(n, rank, world)`.

    Reading sends 8 bytes for each row that is asked for, and a row back for each, in two all-to-alls and one for the
    counts; the host waits for the counts.
    """

    rows: Tensor
    _ends: Tensor

    def __init__(self, size: int, rows: Tensor) -> None:
        super().__init__()
        self.size = size
        self.register_buffer("rows", rows, persistent=False)
        ranks = range(dist.get_world_size())
        self._mine = part(size, dist.get_rank(), len(ranks))
        ends = torch.tensor([part(size, rank, len(ranks)).stop for rank in ranks], device=rows.device)
        self.register_buffer("_ends", ends, persistent=False)

    def read(self, ids: Tensor) -> Tensor:
        """See `losses.contract.Table`."""
        owners = torch.searchsorted(self._ends, ids.flatten(), right=True)
        order = owners.argsort(stable=True)
        asked = torch.bincount(owners, minlength=len(self._ends))
        wanted = torch.empty_like(asked)
        dist.all_to_all_single(wanted, asked)
        out, back = asked.tolist(), wanted.tolist()
        requests = ids.new_empty(sum(back))
        dist.all_to_all_single(requests, ids.flatten()[order], back, out)
        answers = self.rows.index_select(0, requests - self._mine.start)
        got = self.rows.new_empty(ids.numel(), self.rows.shape[1])
        dist.all_to_all_single(got, answers, out, back)
        found = torch.empty_like(got)
        found[order] = got
        return found.float().view(*ids.shape, -1)

    def write(self, ids: Tensor, rows: Tensor) -> None:
        """See `losses.contract.Table`."""
        mine = (ids >= self._mine.start) & (ids < self._mine.stop)
        self.rows.index_copy_(0, ids[mine] - self._mine.start, rows[mine].to(self.rows.dtype))


def make_table(
    device: torch.device,
    size: int,
    width: int,
    dtype: torch.dtype,
    initial: Callable[[Tensor], Tensor],
    *,
    sharded: bool = False,
    apart: bool = False,
) -> Table | ShardedTable:
    """See `losses.contract.MakeTable`."""
    mine = part(size, dist.get_rank(), dist.get_world_size()) if sharded else range(size)
    rows = torch.empty(len(mine), width, dtype=dtype, device=device)
    for ids in torch.arange(mine.start, mine.stop, device=device).split(1 << 16):
        rows[ids - mine.start] = initial(ids + apart * dist.get_rank() * size).to(dtype)
    return ShardedTable(size, rows) if sharded else Table(rows)

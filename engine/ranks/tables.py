"""Tables that all ranks read and write alike: whole on every rank, or each rank with a part of the rows."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator, Mapping

import torch
import torch.distributed as dist
from torch import Tensor, nn

from data_pipelines.order import part


class WholeTable(nn.Module):
    """All rows on every rank.

    Args:
        rows: what stands there at first, [n, d].
    """

    rows: Tensor

    def __init__(self, rows: Tensor) -> None:
        super().__init__()
        self.register_buffer("rows", rows, persistent=False)  # see `parts`

    @property
    def size(self) -> int:
        """n."""
        return len(self.rows)

    @property
    def mine(self) -> range:
        """The rows that are here."""
        return range(self.size)

    def read(self, ids: Tensor) -> Tensor:
        """See `losses.capabilities.Table`."""
        # index_select: faster than indexing on a CPU, and the same on a GPU.
        return self.rows.index_select(0, ids.flatten()).float().view(*ids.shape, self.rows.shape[1])

    def write(self, ids: Tensor, rows: Tensor) -> None:
        """See `losses.capabilities.Table`."""
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
        self.register_buffer("rows", rows, persistent=False)  # see `parts`
        ranks = range(dist.get_world_size())
        self.mine = part(size, dist.get_rank(), len(ranks))
        """The rows that are here."""
        ends = torch.tensor([part(size, rank, len(ranks)).stop for rank in ranks], device=rows.device)
        self.register_buffer("_ends", ends, persistent=False)

    def read(self, ids: Tensor) -> Tensor:
        """See `losses.capabilities.Table`."""
        owners = torch.searchsorted(self._ends, ids.flatten(), right=True)
        order = owners.argsort(stable=True)
        out, back = self._counts(owners)
        requests = ids.new_empty(sum(back))
        dist.all_to_all_single(requests, ids.flatten()[order], back, out)
        answers = self.rows.index_select(0, requests - self.mine.start)
        got = self.rows.new_empty(ids.numel(), self.rows.shape[1])
        dist.all_to_all_single(got, answers, out, back)
        found = torch.empty_like(got)
        found[order] = got
        return found.float().view(*ids.shape, found.shape[1])

    def write(self, ids: Tensor, rows: Tensor) -> None:
        """See `losses.capabilities.Table`."""
        if not self.mine:
            return
        # Picking out this rank's rows would make the host wait for their number. The others go to its first row, with
        # what is to stand there in any case.
        place = ids - self.mine.start
        inside = (place >= 0) & (place < len(self.mine))
        first = inside & (place == 0)
        rows = rows.to(self.rows.dtype)
        stays = torch.where(first.any(), torch.where(first.unsqueeze(1), rows, 0).sum(0), self.rows[0])
        self.rows.index_copy_(0, torch.where(inside, place, 0), torch.where(inside.unsqueeze(1), rows, stays))

    def _counts(self, owners: Tensor) -> tuple[list[int], list[int]]:
        """How many rows this rank asks each rank for, and each asks it for; the host waits for these."""
        ranks = len(self._ends)
        if owners.is_meta:  # As if all were asked for as many.
            return (even := [len(part(owners.numel(), rank, ranks)) for rank in range(ranks)]), even
        asked = torch.bincount(owners, minlength=ranks)
        wanted = torch.empty_like(asked)
        dist.all_to_all_single(wanted, asked)
        return asked.tolist(), wanted.tolist()


def make_table(
    device: torch.device,
    size: int,
    width: int,
    dtype: torch.dtype,
    initial: Callable[[Tensor], Tensor],
    *,
    sharded: bool = False,
    differs_by_rank: bool = False,
) -> WholeTable | ShardedTable:
    """See `losses.capabilities.MakeTable`."""
    mine = part(size, dist.get_rank(), dist.get_world_size()) if sharded else range(size)
    rows = torch.empty(len(mine), width, dtype=dtype, device=device)
    first = dist.get_rank() * size if differs_by_rank else 0
    for ids in torch.arange(mine.start, mine.stop, device=device).split(1 << 16):
        rows[ids - mine.start] = initial(ids + first).to(dtype)
    return ShardedTable(size, rows) if sharded else WholeTable(rows)


# -- in checkpoints ---------------------------------------------------------------------------------------------------


def parts(module: nn.Module) -> dict[str, dict[str, Tensor]]:
    """What this rank has to save of the tables in a module: name of a file -> name of a table -> rows [M, d].

    A whole table is one part, of rank 0; a table in shards has a part for each rank.
    """
    rank, world = dist.get_rank(), dist.get_world_size()
    files: dict[str, dict[str, Tensor]] = {}
    for name, table in _tables(module):
        index, count = (rank, world) if isinstance(table, ShardedTable) else (0, 1)
        if index == rank:
            files.setdefault(f"tables_{index:05d}_of_{count:05d}.pt", {})[name] = table.rows
    return files


def load_parts(module: nn.Module, files: Iterable[str], read: Callable[[str], Mapping[str, Tensor]]) -> list[str]:
    """Puts into the tables in a module what any number of ranks has saved of them, this rank's rows alone.

    Args:
        module: with tables of the same names and sizes, whole or sharded.
        files: names of files, of which those of tables are looked at.
        read: name -> what is in that file.

    Returns:
        The names of tables of which the files do not have all rows, in the same width and number format.
    """
    tables = dict(_tables(module))
    missing = {name: len(table.mine) for name, table in tables.items()}
    for file in files:
        match = re.fullmatch(r"tables_(\d+)_of_(\d+)\.pt", file)
        if not match or int(match[1]) >= int(match[2]):
            continue
        there = {name: part(table.size, int(match[1]), int(match[2])) for name, table in tables.items()}
        both = {name: _common(there[name], table.mine) for name, table in tables.items()}
        found = read(file) if any(both.values()) else {}
        for name, rows in found.items():
            table = tables.get(name)
            if table is None or rows.shape != (len(there[name]), table.rows.shape[1]) or rows.dtype != table.rows.dtype:
                continue
            _cut(table.rows, both[name], table.mine).copy_(_cut(rows, both[name], there[name]))
            missing[name] -= len(both[name])
    return [name for name, rows in missing.items() if rows]


def _common(one: range, other: range) -> range:
    start = max(one.start, other.start)
    return range(start, max(start, min(one.stop, other.stop)))


def _cut(rows: Tensor, wanted: range, held: range) -> Tensor:
    return rows[wanted.start - held.start : wanted.stop - held.start] if wanted else rows[:0]


def _tables(module: nn.Module) -> Iterator[tuple[str, WholeTable | ShardedTable]]:
    for name, inner in module.named_modules():
        if isinstance(inner, WholeTable | ShardedTable):
            yield name, inner

"""Tables that all ranks read and write alike, in shards and whole, on real ranks."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn

from data_pipelines.order import part
from engine.ranks.tables import ShardedTable, WholeTable, load_parts, make_table, parts
from tests.engine.ranks.exchanging.test_exchange import Call, Recorder
from tests.engine.stepping import CPU
from tests.worlds import run_world

SIZE, WIDTH = 23, 3
"""Not a multiple of 2, 3 or 4 ranks."""


def initial(ids: Tensor) -> Tensor:
    return torch.stack([ids * 10.0 + place for place in range(WIDTH)], 1)


def a_table(sharded: bool, dtype: torch.dtype = torch.float32, size: int = SIZE) -> WholeTable | ShardedTable:
    return make_table(CPU, size, WIDTH, dtype, initial, sharded=sharded)


def ids_of(rank: int) -> list[Tensor]:
    """What the rank asks for, read after read: its own rows, others', some twice, a matrix of them, and none."""
    return [
        torch.tensor(part(SIZE, rank, 4)),
        torch.tensor([SIZE - 1, 0, 5, 5, 0, SIZE - 1, rank]),
        torch.randint(SIZE, (4, 2 + rank), generator=torch.Generator().manual_seed(rank)),
        torch.tensor([], dtype=torch.int64) if rank % 2 else torch.tensor([[rank], [7]]),
        torch.empty(0, 5, dtype=torch.int64),
    ]


def reads_and_writes(dtype: torch.dtype) -> bool:
    sharded, whole = a_table(True, dtype), a_table(False, dtype)
    assert isinstance(sharded, ShardedTable)
    assert isinstance(whole, WholeTable)
    rank, world = dist.get_rank(), dist.get_world_size()
    assert torch.equal(sharded.rows, whole.rows[list(part(SIZE, rank, world))])
    assert torch.equal(whole.rows, initial(torch.arange(SIZE)).to(dtype))
    for step in range(3):
        for ids in ids_of(rank):
            found = sharded.read(ids)
            assert found.dtype == torch.float32
            assert found.shape == (*ids.shape, WIDTH)
            assert torch.equal(found, whole.read(ids))
            assert torch.equal(found, whole.rows[ids].float())
        draw = torch.Generator().manual_seed(step)
        ids = torch.randperm(SIZE, generator=draw)[: (0, 5, SIZE)[step]]
        rows = torch.randn(len(ids), WIDTH, generator=draw)
        before = whole.rows.clone()
        for table in (sharded, whole):
            table.write(ids, rows)
        assert torch.equal(whole.rows[ids], rows.to(dtype))
        others = torch.ones(SIZE, dtype=torch.bool).index_fill(0, ids, False)
        assert torch.equal(whole.rows[others], before[others])
        assert torch.equal(sharded.rows, whole.rows[list(part(SIZE, rank, world))])
    return True


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("ranks", [1, 2, 3, 4])
def test_shards_read_and_write_as_the_whole(ranks: int, dtype: torch.dtype) -> None:
    assert run_world(ranks, reads_and_writes, dtype) == [True] * ranks


def fewer_rows_than_ranks() -> Tensor:
    table = a_table(True, size=2)
    table.write(torch.tensor([1]), torch.full((1, WIDTH), 0.5))
    return table.read(torch.tensor([1, 0, 1]))


def test_ranks_without_a_row_take_part_too() -> None:
    expected = torch.tensor([[0.5] * 3, [0.0, 1.0, 2.0], [0.5] * 3])
    for found in run_world(4, fewer_rows_than_ranks):
        assert torch.equal(found, expected)


def calls_of_a_read() -> list[Call]:
    table = a_table(True)
    with Recorder() as recorder:
        table.read(torch.tensor([[0, 22], [11, 3]]))
        table.write(torch.tensor([3]), torch.zeros(1, WIDTH))
    return recorder.calls


def test_a_read_is_three_all_to_alls_and_a_write_none() -> None:
    """Counts, 8 bytes a row asked for, and the rows: rank 0 of two has rows 0 .. 10 and gives 2 to each rank."""
    for calls in run_world(2, calls_of_a_read):
        assert [(call.collective, call.ranks) for call in calls] == [("alltoall_base", (0, 1))] * 3
        assert [call.size for call in calls] == [2 * 8, 4 * 8, 4 * WIDTH * 4]


# -- in checkpoints ---------------------------------------------------------------------------------------------------

Files = Mapping[str, Mapping[str, Tensor]]


class Holder(nn.Module):
    """Two tables, one of them sharded wherever that is asked for."""

    def __init__(self, sharded: bool) -> None:
        super().__init__()
        self.always_whole = a_table(False)
        self.inner = nn.ModuleList([a_table(sharded, torch.bfloat16)])


def saved(sharded: bool) -> Files:
    holder = Holder(sharded)
    ids = torch.tensor([1, 12, 22])
    for table in (holder.always_whole, holder.inner[0]):
        table.write(ids, -torch.arange(9.0).view(3, 3))
    assert not holder.state_dict().keys() & {"always_whole.rows", "inner.0.rows"}
    return parts(holder)


def loaded(sharded: bool, files: Files) -> list[Any]:
    holder, opened = Holder(sharded), list[str]()

    def read(name: str) -> Mapping[str, Tensor]:
        opened.append(name)
        return files[name]

    missing = load_parts(holder, ["shared.pt", *files], read)
    everything = torch.arange(SIZE)
    return [missing, holder.always_whole.read(everything), holder.inner[0].read(everything), opened]


def merged(ranks: int, sharded: bool) -> Files:
    return {name: tables for files in run_world(ranks, saved, sharded) for name, tables in files.items()}


def test_names_of_the_parts() -> None:
    of_ranks = [[*files] for files in run_world(3, saved, True)]
    sharded = [f"tables_0000{i}_of_00003.pt" for i in range(3)]
    assert of_ranks == [["tables_00000_of_00001.pt", sharded[0]], [sharded[1]], [sharded[2]]]
    assert [[*files] for files in run_world(2, saved, False)] == [["tables_00000_of_00001.pt"], []]


@pytest.mark.parametrize(("before", "was"), [(1, False), (3, True), (2, True), (2, False)])
@pytest.mark.parametrize(("after", "sharded"), [(1, False), (2, True), (4, True)])
def test_rows_come_back_on_another_number_of_ranks(before: int, was: bool, after: int, sharded: bool) -> None:
    expected = initial(torch.arange(SIZE))
    expected[[1, 12, 22]] = -torch.arange(9.0).view(3, 3)
    for missing, whole, other, _ in run_world(after, loaded, sharded, merged(before, was)):
        assert missing == []
        assert torch.equal(whole, expected)
        assert torch.equal(other, expected.bfloat16().float())


def test_a_rank_opens_the_files_of_its_own_rows_alone() -> None:
    """Of 23 rows, rank 1 of 2 has 11 .. 22; parts 0 .. 3 of 4 end before rows 5, 11, 17 and 23."""
    files = {name: f for name, f in merged(4, True).items() if name != "tables_00000_of_00001.pt"}
    found = run_world(2, loaded_without_the_other, files)
    assert found == [([], [f"tables_0000{i}_of_00004.pt" for i in pair]) for pair in ((0, 1), (2, 3))]


def loaded_without_the_other(files: Files) -> Any:
    holder, opened = nn.ModuleDict({"inner": nn.ModuleList([a_table(True, torch.bfloat16)])}), list[str]()

    def read(name: str) -> Mapping[str, Tensor]:
        opened.append(name)
        return files[name]

    return load_parts(holder, files, read), opened


def narrower(rows: Tensor) -> Tensor:
    return rows[:, :2].clone()


@pytest.mark.parametrize("change", [None, narrower, partial(torch.Tensor.to, dtype=torch.float64)])
def test_rows_that_are_missing_or_of_another_kind_are_told(change: Any) -> None:
    files = {name: dict(tables) for name, tables in merged(2, True).items()}
    if change is None:
        del files["tables_00001_of_00002.pt"]
    else:
        rows = files["tables_00001_of_00002.pt"]["inner.0"]
        files["tables_00001_of_00002.pt"]["inner.0"] = change(rows)
    assert [missing for missing, *_ in run_world(2, loaded, True, files)] == [[], ["inner.0"]]
    [(missing, *_)] = run_world(1, loaded, False, files)
    assert missing == ["inner.0"]

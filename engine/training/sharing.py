"""Every row is decoded once a node: ranks that need the same rows decode a share each, and pass the pixels on."""

from __future__ import annotations

import heapq
import socket
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from numpy.typing import NDArray
from torch import Tensor

from data_pipelines import Pipeline
from data_pipelines.sources.sections import PHOTOS
from engine.config import RunConfig
from engine.ranks.collectives import FIRST_STEP_TIMEOUT
from engine.ranks.placement import Placement

Rows = NDArray[np.int64]


def share_decoding(config: RunConfig, placement: Placement, pipeline: Pipeline) -> None:
    """Has a pipeline decode this rank's share of the rows that ranks of its node need. All ranks of the world call
    this, before any other group of ranks is made.

    Whoever decodes a row for the rank of the first group of peers that has it counts it if it cannot be read: each row
    is one such rank's."""
    pipeline.counts = placement.group == 0
    if placement.world == 1 or config.data.dataset not in PHOTOS or config.data.shared_decode == "off":
        return
    everyone: list[Any] = [None] * placement.world
    dist.all_gather_object(everyone, (socket.gethostname(), pipeline.may_share))
    here = [rank for rank, each in enumerate(everyone) if each == (socket.gethostname(), True)]
    if placement.rank not in here:
        return
    data, parts = config.data, config.train.accumulation
    whole = np.arange(data.global_batch)
    wanted = {rank: whole[placement.of(rank).rows(data.global_batch, parts, data.tuple_size)] for rank in here}
    ranks = related(wanted)[placement.rank]
    decoded = shares({rank: wanted[rank] for rank in ranks})
    if len(ranks) == 1 or not all(len(rows) for rows in decoded.values()):
        return
    group: Any = dist.new_group(ranks, FIRST_STEP_TIMEOUT, backend="gloo", use_local_synchronization=True)
    counted = counted_of(placement, ranks, wanted, decoded[placement.rank])
    pipeline.sharing = Sharing(placement.rank, wanted, decoded, group, counted)


def counted_of(
    placement: Placement, ranks: Sequence[int], wanted: Mapping[int, Rows], decoded: Rows
) -> NDArray[np.bool_]:
    """Of which of the rows that a rank decodes for some ranks it is counted there if they cannot be read."""
    first = [wanted[rank] for rank in ranks if placement.of(rank).group == 0]
    return np.isin(decoded, np.concatenate([*first, np.empty(0, np.int64)]))


def related(wanted: Mapping[int, Rows]) -> dict[int, list[int]]:
    """The ranks that have rows in common with each, directly or through others, itself included."""
    found = {rank: {rank} for rank in wanted}
    for codes in _kinds(wanted)[1]:
        joined = set().union(*(found[rank] for rank in codes))
        for rank in joined:
            found[rank] = joined
    return {rank: sorted(ranks) for rank, ranks in found.items()}


def shares(wanted: Mapping[int, Rows]) -> dict[int, Rows]:
    """The rows that each rank decodes, ascending: every row is one of a rank that wants it, and ranks have as many as
    each other, as far as that goes.

    Args:
        wanted: rows of a batch that each rank needs, ascending.
    """
    load = dict.fromkeys(wanted, 0)
    found: dict[int, list[Rows]] = {rank: [] for rank in wanted}
    segments, kinds = _kinds(wanted)
    # Those that few want first: the others make up for it.
    for rows, ranks in sorted(zip(segments, kinds, strict=True), key=lambda each: (len(each[1]), each[0][0])):
        heap = [(load[rank], rank) for rank in ranks]
        heapq.heapify(heap)
        for _ in rows:
            least, rank = heap[0]
            heapq.heapreplace(heap, (least + 1, rank))
        begin = 0
        for count, rank in sorted(heap, key=lambda each: each[1]):
            end = begin + count - load[rank]
            found[rank].append(rows[begin:end])
            load[rank], begin = count, end
    return {rank: np.sort(np.concatenate([*pieces, np.empty(0, np.int64)])) for rank, pieces in found.items()}


def _kinds(wanted: Mapping[int, Rows]) -> tuple[list[Rows], list[list[int]]]:
    """Rows that the same ranks want, and these ranks."""
    ranks, size = list(wanted), 1 + max((int(rows[-1]) for rows in wanted.values() if len(rows)), default=-1)
    member = np.zeros((len(ranks), size), bool)
    for place, rank in enumerate(ranks):
        member[place, wanted[rank]] = True
    codes, inverse = np.unique(np.packbits(member, axis=0), axis=1, return_inverse=True)
    rows = [np.flatnonzero(inverse.reshape(-1) == code) for code in range(codes.shape[1])]
    pairs = [(each, [rank for rank, is_in in zip(ranks, member[:, each[0]], strict=True) if is_in]) for each in rows]
    pairs = [(each, of) for each, of in pairs if of]
    return [each for each, _ in pairs], [of for _, of in pairs]


class Sharing:
    """See `data_pipelines.contract.Sharing`. Two all-to-alls a batch, of pixels and of ids, in a group that nobody else
    uses.

    Args:
        rank: this one.
        wanted: rows of a batch that each rank of the group needs, ascending.
        decoded: those that each decodes, ascending.
        group: of these ranks, on gloo.
        counted: see `data_pipelines.contract.Sharing.counted`.
    """

    def __init__(
        self,
        rank: int,
        wanted: Mapping[int, Rows],
        decoded: Mapping[int, Rows],
        group: dist.ProcessGroup | None,
        counted: NDArray[np.bool_],
    ) -> None:
        self._group, self.counted = group, counted
        others = sorted(decoded)
        self.rows = decoded[rank]
        own = np.intersect1d(wanted[rank], self.rows)
        # Places in what is decoded here, and in what is needed here, of what goes to and comes from each.
        nothing = np.empty(0, np.int64)
        out = [np.intersect1d(self.rows, wanted[other]) if other != rank else nothing for other in others]
        back = [np.intersect1d(decoded[other], wanted[rank]) if other != rank else nothing for other in others]
        self._sent = torch.from_numpy(np.searchsorted(self.rows, np.concatenate(out)))
        self._kept = torch.from_numpy(np.searchsorted(self.rows, own))
        # Rows that are kept and then those that come, in the order in which they are needed.
        self._order = torch.from_numpy(np.argsort(np.concatenate([own, *back])))
        self._out, self._back = [len(rows) for rows in out], [len(rows) for rows in back]

    def swap(self, pixels: Tensor, ids: Rows) -> tuple[Tensor, Rows]:
        """See `data_pipelines.contract.Sharing.swap`."""
        return self._swap(pixels), self._swap(torch.from_numpy(ids)[:, None]).view(-1).numpy()

    def _swap(self, x: Tensor) -> Tensor:
        """[rows decoded here, ...] -> [rows needed here, ...]."""
        flat = x.reshape(len(x), -1).view(torch.uint8)
        width, kept = flat.shape[1], len(self._kept)
        pool = torch.empty(len(self._order), width, dtype=torch.uint8)
        torch.index_select(flat, 0, self._kept, out=pool[:kept])
        back, out = ([width * rows for rows in each] for each in (self._back, self._out))
        dist.all_to_all_single(pool[kept:].view(-1), flat.index_select(0, self._sent).view(-1), back, out, self._group)
        return pool.index_select(0, self._order).view(x.dtype).view(-1, *x.shape[1:])

"""The logits of all peers for images that none of them is trained on, in any placement."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence

import torch
from torch import Tensor, nn

from data_pipelines import Batch
from engine.cohort import precision
from engine.ranks.exchanging.exchange import Exchange
from engine.ranks.placement import Placement, Share, interval
from losses import Signals


def shown(
    networks: Mapping[int, nn.Module],
    exchange: Exchange,
    placement: Placement,
    batches: Iterable[Batch],
    size: int,
    classes: int,
    device: torch.device,
    autocast: torch.dtype | None,
) -> Iterator[tuple[Tensor, Tensor, Sequence[Signals]]]:
    """This rank's part of a split, batch by batch, as all peers see it. Every rank calls it, and takes all of it.

    Where the placement is even, ranks that exchange are at the same images at a time. Otherwise they get through the
    split at speeds of their own, so all logits of this rank's part are kept (4 bytes for each class, image and peer)
    and exchanged once, at the end.

    Args:
        networks: of the residents, in evaluation mode.
        exchange: shows their logits to the others.
        placement: of this rank.
        batches: of part `placement.replica` of `placement.replicas`.
        size: images of the split.
        classes: width of the logits.
        device: of the networks.
        autocast: number format of the networks' layers; None as they are.

    Yields:
        ids [N], targets [N] and the `logits` [N, C] of all K peers; nothing of those that live in other jobs.
    """

    def look(rows: Batch) -> dict[int, Signals]:
        with precision.autocast(device, autocast):
            return {k: {"logits": network(rows.images)} for k, network in networks.items()}

    # In float32, or the ensemble would depend on who lives where.
    if placement.is_even:
        for rows in batches:
            yield rows.ids, rows.targets, exchange(look(rows), wire=torch.float32)
        return
    ids, targets = ([torch.zeros(0, dtype=torch.int64, device=device)] for _ in range(2))
    own = {k: [torch.zeros(0, classes, device=device)] for k in networks}
    for rows in batches:
        ids.append(rows.ids)
        targets.append(rows.targets)
        for k, signals in look(rows).items():
            own[k].append(signals["logits"].float())
    sizes = [len(x) for x in ids]
    share = Share(interval(size, 1, placement.replica, placement.replicas), size)
    everyones = exchange({k: {"logits": torch.cat(x)} for k, x in own.items()}, share=share, wire=torch.float32)
    pieces = zip(*(peer["logits"].split(sizes) for peer in everyones), strict=True)
    for some, of_these, logits in zip(ids, targets, pieces, strict=True):
        if len(some):
            yield some, of_these, [{"logits": x} for x in logits]

"""Two things that must hold on every rank and that nobody would notice if they did not."""

from __future__ import annotations

from collections.abc import Collection

import torch
import torch.distributed as dist
from torch import Tensor, nn

from engine.cohort.cohort import Cohort
from engine.ranks.collectives import all_gather


class RanksDisagreeError(RuntimeError):
    """Ranks that must hold or see the same do not; the run cannot be trusted from here on."""


def check_same_rows(cohort: Cohort, ids: Tensor, step: int) -> None:
    """Peers that teach each other must have seen the same samples, row by row. ids int64 [n] of this rank's rows of the
    last global batch.

    Raises:
        RanksDisagreeError: on every rank of the exchange group.
    """
    # Odd weights, so that an order is told from another; int64 wraps around, which is all a hash wants.
    rows = torch.cat([torch.arange(share.rows.start, share.rows.stop, device=ids.device) for share in cohort.shares])
    mine = (ids * (rows * 0x5851F42D4C957F2D + 1)).sum().reshape(1)
    if cohort.exchange.group.size() == 1:
        return
    # Each group of an exchange has the same rows, though its ranks may have others each.
    sums = torch.zeros(len(cohort.placement.groups), dtype=torch.int64, device=ids.device)
    sums.index_add_(
        0, torch.tensor(cohort.exchange.groups, device=ids.device), all_gather(mine, cohort.exchange.group).flatten()
    )
    if not bool((sums == sums[0]).all().item()):
        raise RanksDisagreeError(f"step {step}: ranks that exchange signals have seen different samples")


def check_same_weights(cohort: Cohort, step: int) -> None:
    """Replicas of a peer, and all copies of the method's shared modules, must be equal bit for bit.

    Raises:
        RanksDisagreeError: on every rank of the group that disagrees.
    """
    for resident in cohort.residents.values():
        if not _equal(_checksum(resident.peer, resident.unsynchronised), cohort.replica_group):
            raise RanksDisagreeError(f"step {step}: replicas of {resident.name} hold different weights")
    if cohort.shared_optimizer is not None and not _equal(_checksum(cohort.shared), dist.group.WORLD):
        raise RanksDisagreeError(f"step {step}: the modules that all peers share differ between ranks")


def _equal(number: Tensor, group: dist.ProcessGroup | None) -> bool:
    assert group is not None
    if group.size() == 1:
        return True
    numbers = all_gather(number.reshape(1), group)
    return bool((numbers == numbers[0]).all().item())


def _checksum(module: nn.Module, but: Collection[str] = ()) -> Tensor:
    """Of the bits of all parameters but some, in int64."""
    sums = [
        p.detach().view(torch.int32).sum(dtype=torch.int64) * (2 * i + 1)
        for i, (name, p) in enumerate(module.named_parameters())
        if name not in but
    ]
    return torch.stack(sums).sum()

"""Means of the terms of the objective between two lines of metrics, kept on the device until then."""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor

from engine.placement import Placement
from losses import Terms


class Meter:
    """Adds up what `train_step` returns; `read` is the only place where the host waits."""

    def __init__(self, placement: Placement, device: torch.device) -> None:
        self._placement, self._device = placement, device
        self._keys: list[tuple[int | None, str]] = []
        self._sums: Terms = {}
        self._steps = torch.zeros(1, device=device)
        self.in_a_row = torch.zeros(1, device=device)
        """Updates skipped up to now without one that was made."""
        self._longest = torch.zeros(1, device=device)
        self._skipped = torch.zeros(1, device=device)

    def add(self, terms: Terms, skipped: Tensor) -> None:
        """Counts one step. Terms of a skipped step, which may be non-finite, are left out of the means."""
        for key, value in terms.items():
            value = torch.where(skipped > 0, 0.0, value.reshape(1))
            self._sums[key] = self._sums[key] + value if key in self._sums else value
        self._steps += 1 - skipped
        self._skipped += skipped
        self.in_a_row = (self.in_a_row + 1) * skipped
        self._longest = torch.maximum(self._longest, self.in_a_row)

    def read(self) -> tuple[dict[tuple[int | None, str], float], int, int]:
        """Means over the steps since the last reading and over the ranks, the same on every rank; then zero again.

        Returns:
            {(peer, name): mean}, the number of updates skipped and the longest row of them.
        """
        new = torch.tensor([bool(self._sums.keys() - set(self._keys))], dtype=torch.int32, device=self._device)
        dist.all_reduce(new, dist.ReduceOp.MAX)
        if new.item():
            everyones: list[list[tuple[int | None, str]]] = [[] for _ in range(self._placement.world)]
            dist.all_gather_object(everyones, list(self._sums))
            self._keys = sorted({key for keys in [*everyones, self._keys] for key in keys}, key=str)
        sums = torch.zeros(len(self._keys), device=self._device)
        for i, key in enumerate(self._keys):
            if key in self._sums:
                holders = self._placement.world if key[0] is None else self._placement.replicas
                sums[i] = self._sums[key][0] / holders
        dist.all_reduce(sums)
        *means, skipped, longest = torch.cat([sums / self._steps, self._skipped, self._longest]).tolist()
        self._sums.clear()
        self._steps.zero_()
        self._skipped.zero_()
        self._longest.copy_(self.in_a_row)
        return dict(zip(self._keys, means, strict=True)), int(skipped), int(longest)

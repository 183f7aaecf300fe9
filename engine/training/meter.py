"""The terms of the objective step by step between two lines of metrics, kept on the device until then."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from engine.ranks.placement import Placement
from losses import Terms

Key = tuple[int | None, str]


@dataclass(frozen=True)
class Reading:
    """Of the steps since the last reading, averaged over the ranks; the same on every rank."""

    terms: dict[Key, Tensor]
    """(peer, name) -> [steps] float64 on the CPU; NaN in steps whose update was skipped, 0 where there was none."""
    skipped: int
    """Updates skipped."""
    longest: tuple[int, int]
    """The longest row of skipped updates: the step in which it began, counted from the first of this reading and
    negative where that was before it, and its length."""

    @property
    def means(self) -> dict[Key, float]:
        """Over the steps whose update was made; NaN where there was none."""
        return {key: values.nanmean().item() for key, values in self.terms.items()}

    def losses(self) -> dict[int | None, list[float]]:
        """The sum of the terms of each peer, and of the whole cohort's (None), in each step."""
        sums: dict[int | None, Tensor] = {}
        for (k, name), values in self.terms.items():
            if name != "grad_norm":
                sums[k] = sums[k] + values if k in sums else values
        return {k: values.tolist() for k, values in sums.items()}


class Meter:
    """Remembers what `train_step` returns; `read` is the only place where the host waits."""

    def __init__(self, placement: Placement, device: torch.device) -> None:
        self._placement, self._device = placement, device
        self._keys: list[Key] = []
        self._steps: list[tuple[tuple[Key, ...], Tensor]] = []
        self._skipped: list[Tensor] = []
        self._nothing = torch.zeros((), device=device)
        self.in_a_row = 0
        """Updates skipped up to the last reading without one that was made."""

    def add(self, terms: Terms, skipped: Tensor) -> None:
        """Counts one step. Terms of a skipped step, which may be non-finite, are left out of the means."""
        self._steps.append((tuple(terms), torch.stack([self._nothing, *(x.reshape(()) for x in terms.values())])))
        self._skipped.append(skipped)

    def read(self) -> Reading:
        """What has been added since the last reading; one all-reduce, one wait for the device."""
        here = {key for keys, _ in self._steps for key in keys}
        new = torch.tensor([bool(here - set(self._keys))], dtype=torch.int32, device=self._device)
        dist.all_reduce(new, dist.ReduceOp.MAX)
        if new.item():
            everyones: list[list[Key]] = [[] for _ in range(self._placement.world)]
            dist.all_gather_object(everyones, list(here))
            self._keys = sorted({key for keys in [*everyones, self._keys] for key in keys}, key=str)
        return self._close(self._table())

    def _table(self) -> Tensor:
        """[steps, 1 + terms] float64 on the CPU: whether the update was skipped, then the terms over all ranks."""
        table = torch.zeros(len(self._steps), 1 + len(self._keys), device=self._device)
        if not self._steps:
            return table.double().cpu()
        by_keys: dict[tuple[Key, ...], list[int]] = {}
        for step, (keys, _) in enumerate(self._steps):
            by_keys.setdefault(keys, []).append(step)
        for keys, steps in by_keys.items():
            holders = [self._placement.world if k is None else self._placement.replicas for k, _ in keys]
            share = torch.tensor([1.0, *(1 / n for n in holders)], device=self._device)
            places = [0, *(1 + self._keys.index(key) for key in keys)]
            rows = torch.tensor(steps, device=self._device)[:, None]
            table[rows, torch.tensor(places, device=self._device)] = (
                torch.stack([self._steps[step][1] for step in steps]) * share
            )
        dist.all_reduce(table)
        table[:, 0] = torch.cat(self._skipped)
        return table.double().cpu()

    def _close(self, table: Tensor) -> Reading:
        skipped = table[:, 0] > 0
        longest = (-self.in_a_row, self.in_a_row)
        for step, skip in enumerate(skipped.tolist()):
            self.in_a_row = (self.in_a_row + 1) * skip
            if self.in_a_row > longest[1]:
                longest = (step + 1 - self.in_a_row, self.in_a_row)
        self._steps.clear()
        self._skipped.clear()
        terms = table[:, 1:].masked_fill(skipped[:, None], torch.nan)
        return Reading(dict(zip(self._keys, terms.unbind(1), strict=True)), int(skipped.sum()), longest)

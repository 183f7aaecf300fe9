"""What each step told between two lines of metrics, terms and norms, kept on the device until then."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from engine.ranks.placement import Placement
from engine.training.step import Outcome

Key = tuple[int | None, str]
_Column = tuple[int | None, str, bool]
"""Peer, name, and whether it is a term of the objective; otherwise the norm of a gradient."""


@dataclass(frozen=True)
class Reading:
    """Of the steps since the last reading, averaged over the ranks; the same on every rank."""

    terms: dict[Key, Tensor]
    """(peer, name) -> [steps] float64 on the CPU; NaN in steps whose update was skipped, 0 where there was none."""
    norms: dict[int, Tensor]
    """peer -> [steps], the norm of its gradient, as the terms."""
    skipped: int
    """Updates skipped."""
    longest: tuple[int, int]
    """The longest row of skipped updates: the step in which it began, counted from the first of this reading and
    negative where that was before it, and its length."""

    def losses(self) -> dict[int | None, list[float]]:
        """The sum of the terms of each peer, and of the whole cohort's (None), in each step."""
        sums: dict[int | None, Tensor] = {}
        for (k, _), values in self.terms.items():
            sums[k] = sums[k] + values if k in sums else values
        return {k: values.tolist() for k, values in sums.items()}


class Meter:
    """Remembers what `train_step` returns; `read` is the only place where the host waits."""

    def __init__(self, placement: Placement, device: torch.device) -> None:
        self._placement, self._device = placement, device
        self._columns: list[_Column] = []
        self._steps: list[tuple[tuple[_Column, ...], Tensor]] = []
        self._skipped: list[Tensor] = []
        self._nothing = torch.zeros((), device=device)
        self.in_a_row = 0
        """Updates skipped up to the last reading without one that was made."""

    def add(self, outcome: Outcome) -> None:
        """Counts one step. Terms of a skipped step, which may be non-finite, are left out of the means."""
        columns: dict[_Column, Tensor] = {(k, name, True): x for (k, name), x in outcome.terms.items()}
        columns |= {(k, "grad_norm", False): x for k, x in outcome.norms.items()}
        self._steps.append((tuple(columns), torch.stack([self._nothing, *(x.reshape(()) for x in columns.values())])))
        self._skipped.append(outcome.skipped)

    def read(self) -> Reading:
        """What has been added since the last reading; one all-reduce, one wait for the device."""
        here = {column for columns, _ in self._steps for column in columns}
        new = torch.tensor([bool(here - set(self._columns))], dtype=torch.int32, device=self._device)
        dist.all_reduce(new, dist.ReduceOp.MAX)
        if new.item():
            everyones: list[list[_Column]] = [[] for _ in range(self._placement.world)]
            dist.all_gather_object(everyones, list(here))
            self._columns = sorted({column for columns in [*everyones, self._columns] for column in columns}, key=str)
        return self._close(self._table())

    def _table(self) -> Tensor:
        """[steps, 1 + columns] float64 on the CPU: whether the update was skipped, then the columns over all ranks."""
        table = torch.zeros(len(self._steps), 1 + len(self._columns), device=self._device)
        if not self._steps:
            return table.double().cpu()
        alike: dict[tuple[_Column, ...], list[int]] = {}
        for step, (columns, _) in enumerate(self._steps):
            alike.setdefault(columns, []).append(step)
        for columns, steps in alike.items():
            holders = [self._holders(column) for column in columns]
            share = torch.tensor([1.0, *(1 / n for n in holders)], device=self._device)
            places = [0, *(1 + self._columns.index(column) for column in columns)]
            rows = torch.tensor(steps, device=self._device)[:, None]
            table[rows, torch.tensor(places, device=self._device)] = (
                torch.stack([self._steps[step][1] for step in steps]) * share
            )
        dist.all_reduce(table)
        table[:, 0] = torch.cat(self._skipped)
        return table.double().cpu()

    def _holders(self, column: _Column) -> float:
        """What the sum over all ranks is divided by. Terms are weighted for the mean number of replicas."""
        k, _, is_term = column
        if k is None:
            return self._placement.world
        return self._placement.mean_replicas if is_term else self._placement.replicas

    def _close(self, table: Tensor) -> Reading:
        skipped = table[:, 0] > 0
        longest = (-self.in_a_row, self.in_a_row)
        for step, skip in enumerate(skipped.tolist()):
            self.in_a_row = (self.in_a_row + 1) * skip
            if self.in_a_row > longest[1]:
                longest = (step + 1 - self.in_a_row, self.in_a_row)
        self._steps.clear()
        self._skipped.clear()
        values = table[:, 1:].masked_fill(skipped[:, None], torch.nan).unbind(1)
        found = dict(zip(self._columns, values, strict=True))
        return Reading(
            terms={(k, name): x for (k, name, is_term), x in found.items() if is_term},
            norms={k: x for (k, _, is_term), x in found.items() if k is not None and not is_term},
            skipped=int(skipped.sum()),
            longest=longest,
        )

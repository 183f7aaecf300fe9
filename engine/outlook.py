"""What of a run a rehearsal tells the planner: what peers show each other, and what a rank holds."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch

from engine.config import RunConfig
from engine.ranks.placement import Group, Placement, Share
from engine.ranks.planning.planner import Load
from engine.rehearsal import Images, RehearsalError, open_rehearsed, rehearse
from engine.training.step import blank
from losses import Progress
from losses.capabilities import AllRows

RESERVED = 2.0e9
"""Bytes of a GPU that CUDA, cuDNN, NCCL and a decoder take. Assumed."""

USABLE = 0.95
"""Of the rest, what fits without the allocator's holes in between. Assumed."""


@dataclass(frozen=True)
class Held:
    """Bytes of a rank as a function of the rows of its largest micro-batch."""

    fixed: float
    row: float

    def of(self, rows: int) -> float:
        """For so many rows."""
        return self.fixed + self.row * rows

    def rows(self, memory: float) -> int:
        """How many rows fit a GPU of so many bytes; 0 where none do."""
        return max(0, int((USABLE * (memory - RESERVED) - self.fixed) / self.row))


def with_signals(load: Load, config: RunConfig, images: Images) -> Load:
    """A load with the widths of what this method's peers really show, found without numbers."""
    count = len(config.cohort)
    unit = config.data.tuple_size
    alone = config.model_copy(
        update={
            "placement": type(config.placement)(),
            "data": config.data.model_copy(update={"global_batch": 2 * unit}),
            "train": config.train.model_copy(update={"accumulation": 1}),
        }
    )
    with open_rehearsed(alone, Placement.even(count, count, 1, 0), images) as cohort:
        mode = cohort.method.exchange
        if mode == "none":
            return replace(load, shown=None)
        with torch.no_grad():
            signals = cohort.forward(blank(cohort, 2 * unit), Progress(0, 1, 1), 0, range(count))
        everywhere = cohort.method.everywhere if isinstance(cohort.method, AllRows) else ()
        widths = {
            k: {name: x[0].numel() for name, x in own.items() if name not in cohort.private}
            for k, own in signals.items()
        }
    return replace(
        load,
        shown={k: sum(n for name, n in own.items() if name not in everywhere) for k, own in widths.items()},
        everywhere={k: sum(own[name] for name in everywhere) for k, own in widths.items()} if everywhere else None,
        comes_back=mode == "differentiable",
    )


def memory_of(config: RunConfig, images: Images) -> Callable[[Sequence[int]], Held]:
    """What a rank holds with these residents: two steps are rehearsed for each set of residents that is asked for, the
    others on a rank of their own. A method that looks at all rows of the global batch sees no more than these there."""
    unit = config.data.tuple_size

    @functools.cache
    def held(residents: tuple[int, ...]) -> Held:
        others = tuple(k for k in range(len(config.cohort)) if k not in residents)
        groups = (Group(residents, (0,)), *((Group(others, (1,)),) if others else ()))
        found = [
            rehearse(_of(config, rows), Placement(len(config.cohort), groups, 0), images).memory.total
            for rows in (8 * unit, 16 * unit)
        ]
        row = (found[1] - found[0]) / (8 * unit)
        return Held(found[0] - row * 8 * unit, row)

    return lambda residents: held(tuple(residents))


def largest_share(placement: Placement, load: Load) -> dict[int, int]:
    """Rows of the largest micro-batch of a rank, for each group."""

    def rows(shares: Sequence[Share]) -> int:
        return max(len(share.rows) for share in shares)

    return {
        g: max(
            rows(placement.of(rank).cut(load.batch, load.parts, load.unit))
            for rank in (*group.ranks[:8], *group.ranks[-8:])
        )
        for g, group in enumerate(placement.groups)
    }


def largest_batch(placement: Placement, load: Load, memory: float, held: Callable[[Sequence[int]], Held]) -> int:
    """The largest global batch that a GPU of so many bytes takes in this placement, in whole rows of every rank."""
    fits = [len(group.ranks) * load.parts * held(group.peers).rows(memory) for group in placement.groups]
    step = placement.components * load.parts * load.unit
    return min(fits) // step * step


def _of(config: RunConfig, rows: int) -> RunConfig:
    return config.model_copy(
        update={
            "data": config.data.model_copy(update={"global_batch": rows}),
            "train": config.train.model_copy(update={"accumulation": 1}),
        }
    )


__all__ = ["Held", "RehearsalError", "largest_batch", "largest_share", "memory_of", "with_signals"]

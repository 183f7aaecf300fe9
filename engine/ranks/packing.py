"""Signals beside each other in one tensor, and apart again; whole numbers as digits that survive any format."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from engine.ranks.routes import Route
from losses import Signals

Shapes = list[tuple[str, tuple[int, ...]]]
"""Of what one peer shows, by name and in order."""

_DIGITS = 4


def size_of(peers: Mapping[int, Shapes]) -> int:
    """Numbers of all that some peers show."""
    return sum(math.prod(shape) for shapes in peers.values() for _, shape in shapes)


def beside(signals: Mapping[int, Signals], shapes: Mapping[int, Shapes], rows: int) -> Tensor:
    """Signals of some peers side by side, [rows, S]; shapes are those of a row."""
    columns = [signals[k][name].reshape(rows, math.prod(shape)) for k, own in shapes.items() for name, shape in own]
    if columns:
        return columns[0] if len(columns) == 1 else torch.cat(columns, 1)
    return next(x for own in signals.values() for x in own.values()).new_empty(rows, 0)


def apart(flat: Tensor, peers: Mapping[int, Shapes]) -> dict[int, Signals]:
    """What some peers show, from their numbers one after another in the last dimension of `flat`: [S or more], or
    [N, S] of N rows whose shapes these are."""
    sizes = [math.prod(shape) for shapes in peers.values() for _, shape in shapes]
    pieces = iter(flat[..., : sum(sizes)].split(sizes, -1))
    rows = flat.shape[:-1]
    return {k: {name: next(pieces).reshape((*rows, *shape)) for name, shape in shapes} for k, shapes in peers.items()}


def as_digits(numbers: Tensor) -> Tensor:
    """int64 [N] in 0 .. 2^32 - 1 -> its digits to the base 256, float32 [N, 4], which bf16 keeps exactly too."""
    return torch.stack([numbers >> 8 * place & 255 for place in range(_DIGITS)], 1).float()


def as_numbers(digits: Tensor) -> Tensor:
    """[N, 4] -> int64 [N]."""
    return sum(digits[:, place].long() << 8 * place for place in range(_DIGITS))  # type: ignore[return-value]


def packed(
    sent: Mapping[int, Signals],
    way: Route,
    near: Sequence[Mapping[int, Shapes]],
    wide: Sequence[Mapping[int, Shapes]],
    labels: tuple[Tensor, Tensor] | None,
) -> Tensor:
    """What this rank sends to each, one after another.

    Args:
        sent: signals of the peers here, for its rows.
        way: of the rows.
        near: of each group, the shapes of a row of what goes to those who see the row too, and
        wide: of what goes everywhere.
        labels: targets and ids of the rows, for the ranks of this group.
    """
    group, first, n = way.groups[way.own], way.mine.start, len(way.mine)
    rows = beside(sent, near[group], n)
    of_all = beside(sent, wide[group], n).reshape(-1)
    digits = None if labels is None else torch.cat([as_digits(x) for x in labels], 1).to(rows.dtype).reshape(-1)
    pieces = [rows.reshape(-1)[:0]]
    for g, common in zip(way.groups, way.common, strict=True):
        pieces += [rows[common.start - first : common.stop - first].reshape(-1), of_all] if len(common) else [of_all]
        pieces += [digits] if g == group and digits is not None else []
    return torch.cat(pieces)


def unpacked(
    got: Sequence[Tensor],
    way: Route,
    near: Sequence[Mapping[int, Shapes]],
    wide: Sequence[Mapping[int, Shapes]],
    numbered: int,
) -> tuple[dict[int, Signals], tuple[Tensor, Tensor] | None]:
    """What came from each rank -> the signals of the peers of other groups, and of all rows."""
    shown: dict[int, Signals] = {}
    labels: tuple[Tensor, Tensor] | None = None
    start, stop = way.mine.start, way.mine.stop
    for g, (some, all_) in enumerate(zip(near, wide, strict=True)):
        width, wide_width = size_of(some), size_of(all_)
        blocks = [
            (x, len(common) * width, len(rows) * wide_width)
            for h, x, common, rows in zip(way.groups, got, way.common, way.rows, strict=True)
            if h == g
        ]
        found: dict[int, Signals] = {k: {} for k in some}
        if g != way.groups[way.own] and width:
            found = apart(torch.cat([x[:a].view(-1, width) for x, a, _ in blocks]), some)
        if wide_width:
            every = torch.cat([x[a : a + b].view(-1, wide_width) for x, a, b in blocks])
            named = apart(every, all_)
            found = {
                k: {
                    **found[k],
                    **{name: x[start:stop] for name, x in named[k].items()},
                    # This rank's rows first, then those of the ranks after it, round and round.
                    **{f"all_{name}": torch.cat([x[start:], x[:start]]) for name, x in named[k].items()},
                }
                for k in found
            }
        if g == way.groups[way.own] and numbered:
            digits = torch.cat([x[a + b :].view(-1, numbered) for x, a, b in blocks])
            digits = torch.cat([digits[start:], digits[:start]])
            labels = as_numbers(digits[:, : numbered // 2]), as_numbers(digits[:, numbered // 2 :])
        shown |= found
    return shown, labels

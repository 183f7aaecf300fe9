"""Signals beside each other in one tensor, and apart again; whole numbers as digits that survive any format."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from engine.ranks.exchanging.hierarchy import Hierarchy
from engine.ranks.exchanging.routes import Route, Widths
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


@dataclass(frozen=True)
class Block:
    """What one rank shows of its rows, or of some of them."""

    rows: Sequence[range]
    """Of the micro-batch, ascending and apart."""
    near: Tensor
    """[N, S] of these, what goes to those who see the row too."""
    wide: Tensor
    """Flat, of all rows of the rank, what goes everywhere, and"""
    labels: Tensor
    """what goes to the ranks of its group beside that."""

    def some(self, rows: range) -> Tensor:
        """Flat, what goes to those who see these rows, which follow each other and are among `rows`."""
        at = 0
        for held in self.rows:
            if rows.start < held.stop:
                at += rows.start - held.start
                break
            at += len(held)
        return self.near[at : at + len(rows)].reshape(-1)

    def rest(self, *, kin: bool) -> list[Tensor]:
        """What goes everywhere, and to ranks of the same group."""
        return [self.wide, self.labels] if kin else [self.wide]

    def piece(self, rows: range, *, kin: bool) -> list[Tensor]:
        """What a rank gets that sees these rows, and is of the same group or not."""
        return [self.some(rows), *self.rest(kin=kin)] if rows else self.rest(kin=kin)


def block_of(
    sent: Mapping[int, Signals],
    way: Route,
    near: Sequence[Mapping[int, Shapes]],
    wide: Sequence[Mapping[int, Shapes]],
    labels: tuple[Tensor, Tensor] | None,
) -> Block:
    """All that this rank shows.

    Args:
        sent: signals of the peers here, for its rows.
        way: of the rows.
        near: of each group, the shapes of a row of what goes to those who see the row too, and
        wide: of what goes everywhere.
        labels: targets and ids of the rows, for the ranks of this group.
    """
    group, n = int(way.groups[way.own]), len(way.mine)
    rows = beside(sent, near[group], n)
    digits = rows.new_empty(0) if labels is None else torch.cat([as_digits(x) for x in labels], 1).to(rows.dtype)
    return Block([way.mine], rows, beside(sent, wide[group], n).reshape(-1), digits.reshape(-1))


def packed(block: Block, way: Route) -> Tensor:
    """What this rank sends to each, one after another."""
    group = int(way.groups[way.own])
    pieces = [block.near.reshape(-1)[:0]]
    for g, common in zip(way.groups.tolist(), way.common, strict=True):
        pieces += block.piece(common, kin=g == group)
    return torch.cat(pieces)


def packed_across(block: Block, levels: Hierarchy, place: int) -> Tensor:
    """What this rank, at its place among the others, sends to other nodes, in the order of those who take it there."""
    reach, pieces = levels.reach(place), [block.near.reshape(-1)[:0]]
    others = [node for node in range(levels.count) if node != levels.nodes[place]]
    for node in sorted(others, key=lambda node: int(levels.carriers(node)[place])):
        pieces += [block.some(rows) for rows in reach.get(node, [])]
        pieces += block.rest(kin=levels.has_kin(place, node))
    return torch.cat(pieces)


def packed_within(block: Block, arrived: Sequence[Tensor], levels: Hierarchy, place: int, widths: Widths) -> Tensor:
    """What this rank sends to each rank of its node: of its own rows, and of those that came from other nodes.

    Args:
        block: its own.
        arrived: from each rank of the exchange, as `packed_across` made it there.
    """
    way, blocks = levels.way, {place: block}
    for source in levels.carried(place):
        if source != place:
            group, n = int(way.groups[source]), int(way.stops[source] - way.starts[source])
            rows, width = levels.reach(source).get(int(levels.nodes[place]), []), widths.near[group]
            sizes = [sum(map(len, rows)) * width, n * widths.wide[group]]
            near, wide, labels = arrived[source].split([*sizes, len(arrived[source]) - sum(sizes)])
            blocks[source] = Block(rows, near.view(-1, width) if width else near.view(0, 0), wide, labels)
    pieces = [block.near.reshape(-1)[:0]]
    for other in levels.here(place):
        common = levels.seen(other).common
        for source, held in sorted(blocks.items()):
            pieces += held.piece(common[source], kin=bool(way.groups[source] == way.groups[other]))
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
    start, stop, groups, own = way.mine.start, way.mine.stop, way.groups.tolist(), int(way.groups[way.own])
    for g, (some, all_) in enumerate(zip(near, wide, strict=True)):
        width, wide_width = size_of(some), size_of(all_)
        blocks = [
            (x, len(common) * width, len(rows) * wide_width)
            for h, x, common, rows in zip(groups, got, way.common, way.rows, strict=True)
            if h == g
        ]
        found: dict[int, Signals] = {k: {} for k in some}
        if g != own and width:
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
        if g == own and numbered:
            digits = torch.cat([x[a + b :].view(-1, numbered) for x, a, b in blocks])
            digits = torch.cat([digits[start:], digits[:start]])
            labels = as_numbers(digits[:, : numbered // 2]), as_numbers(digits[:, numbered // 2 :])
        shown |= found
    return shown, labels

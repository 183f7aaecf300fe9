"""Which way an all-to-all goes: whether in two levels, and by which groups of ranks."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from engine.ranks.collectives import gather_objects, group_of, leave
from engine.ranks.exchanging.hierarchy import Hierarchy, hierarchy
from engine.ranks.exchanging.packing import Block, packed_across, packed_within
from engine.ranks.exchanging.routes import Route, Widths, route
from engine.ranks.placement import Placement, Share

Send = Callable[[Tensor, list[int], list[int], dist.ProcessGroup], Tensor]
"""An all-to-all, with gradient or without."""


class Verdict(NamedTuple):
    """On an exchange that could be done in two levels."""

    two: bool
    why: str
    """In a sentence, for a person."""


Judge = Callable[[Hierarchy, Widths, int, bool], Verdict]
"""(levels, widths, bytes of a number, whether gradients come back) -> the same verdict on all ranks."""


class Levels:
    """Of the exchanges of one rank.

    Args:
        placement: of this rank.
        judge: None where there is to be one level always.
    """

    def __init__(self, placement: Placement, judge: Judge | None) -> None:
        self._placement, self._judge = placement, judge
        self.remark = ""
        """Of the last verdict."""
        self._routes: dict[tuple[int, int, bool], Route] = {}
        self._alike: dict[bool, bool] = {}
        self._verdicts: dict[object, Hierarchy | None] = {}
        self._groups: dict[tuple[int, ...], dist.ProcessGroup] = {}

    def route(self, share: Share, *, everywhere: bool) -> Route:
        """The route of this rank's rows, in one level."""
        key = share.batch, share.unit, everywhere
        if key not in self._routes:
            self._routes[key] = route(self._placement, share, everywhere=everywhere)
        return self._routes[key]

    def of(
        self,
        way: Route,
        share: Share,
        widths: Widths,
        itemsize: int,
        group: dist.ProcessGroup,
        *,
        everywhere: bool,
        back: bool,
    ) -> Hierarchy | None:
        """The two levels of an exchange, or None where it is to have one. All ranks of `group` come to the same.

        Args:
            way: of the rows of
            share: of this rank.
            widths: of a row.
            itemsize: bytes of a number under way.
            group: of all that exchange.
            everywhere: whether that is the world.
            back: whether gradients come back.
        """
        per_node = self._placement.per_node
        if self._judge is None or per_node is None or per_node >= self._placement.world:
            return None
        if everywhere not in self._alike:
            # Where nodes have unequal numbers of ranks, no rank knows the node of another.
            self._alike[everywhere] = len(set(gather_objects(per_node, group))) == 1
        if not self._alike[everywhere]:
            return None
        key = share.batch, share.unit, widths, itemsize, everywhere, back
        if key not in self._verdicts:
            levels = hierarchy(way, self._placement.nodes(way.ranks))
            if levels is not None:
                verdict = self._judge(levels, widths, itemsize, back)
                self.remark, levels = verdict.why, levels if verdict.two else None
            self._verdicts[key] = levels
        return self._verdicts[key]

    def exchanged(
        self, block: Block, levels: Hierarchy, widths: Widths, wire: torch.dtype, send: Send, group: dist.ProcessGroup
    ) -> list[Tensor]:
        """What every rank of `group` has for this one, as one all-to-all would bring it. Two collectives: between
        nodes, over the group, and within the node. Where gradients come back, they are added up in each node first."""
        place = levels.way.own
        out, back = (sizes.tolist() for sizes in levels.across(place, widths))
        arrived = send(packed_across(block, levels, place).to(wire), out, back, group).float().split(back)
        flat = packed_within(block, arrived, levels, place, widths).to(wire)
        ranks = tuple(levels.way.ranks[other] for other in levels.here(place))
        if len(ranks) > 1:
            if ranks not in self._groups:
                self._groups[ranks] = group_of(ranks)
            flat = send(flat, *levels.within(place, widths), self._groups[ranks])
        order, sizes = levels.order(place), levels.seen(place).sizes(widths)[1]
        pieces = dict(zip(order, flat.float().split(sizes[order].tolist()), strict=True))
        return [pieces[other] for other in range(len(order))]

    def close(self) -> None:
        """Leaves the groups within nodes."""
        for group in self._groups.values():
            leave(group)

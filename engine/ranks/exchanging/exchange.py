"""The one communication between peers in a step: everybody's signals in one flat buffer."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Literal

import torch
import torch.distributed as dist
from torch import Tensor

from engine.ranks.collectives import (
    GatherObjects,
    all_gather,
    all_gather_with_gradient,
    all_to_all,
    all_to_all_with_gradient,
    gather_objects,
    leave,
)
from engine.ranks.exchanging.levels import Judge, Levels
from engine.ranks.exchanging.packing import Shapes, apart, as_digits, as_numbers, block_of, packed, size_of, unpacked
from engine.ranks.exchanging.routes import NUMBERS_OF_A_ROW, Widths, gathers
from engine.ranks.placement import Placement, Share, interval
from losses import Signals


class Exchange:
    """Shows the signals of this rank's peers to the ranks that hold the others, and theirs to this rank.

    Args:
        placement: of this rank.
        group: of `placement.exchange_ranks`.
        wire: format of signals under way.
        judge: says where an all-to-all is done in two levels; None: nowhere.
    """

    def __init__(
        self,
        placement: Placement,
        group: dist.ProcessGroup,
        wire: torch.dtype = torch.float32,
        judge: Judge | None = None,
    ) -> None:
        self._placement, self.group, self._wire = placement, group, wire
        self.levels = Levels(placement, judge)
        self.gather_objects: GatherObjects = gather_objects
        """How ranks tell each other the shapes of what they show, once for each set of shapes."""
        ranks = placement.exchange_ranks
        self._own = ranks.index(placement.rank)
        self.groups = [placement.of(rank).group for rank in ranks]
        """Which group each of the ranks is in that exchange."""
        # Of each group, the place of one of its ranks among them.
        self._speakers = [self.groups.index(g) for g in range(len(placement.groups))]
        self._layouts: dict[object, list[dict[int, Shapes]]] = {}

    def __call__(
        self,
        own: Mapping[int, Signals],
        mode: Literal["none", "detached", "differentiable"] = "detached",
        *,
        share: Share | None = None,
        private: Sequence[str] = (),
        everywhere: Sequence[str] = (),
        labels: tuple[Tensor, Tensor] | None = None,
        wire: torch.dtype | None = None,
    ) -> Sequence[Signals]:
        """One collective, or none where all that is asked for is here or `mode` is `none`: over the exchange group, or
        over the world where signals are wanted `everywhere`. An all-gather where the ranks have as many rows each,
        otherwise an all-to-all, which brings each rank the rows that it sees itself.

        Args:
            own: signals of each resident, every tensor of this rank's N rows.
            mode: `detached`: the other peers' signals are constants. `differentiable`: the gradients that other ranks
                have for this rank's signals come back in the backward pass. `none`: the others' signals stay empty.
            share: which rows these are of a batch. May be left out where the placement is even and nothing is wanted
                everywhere.
            private: names of signals that are not sent.
            everywhere: names of signals that are wanted for the rows of all replicas too, see `AllRows.everywhere`.
            labels: the targets and ids of the N rows, int64 [N] each, which go with signals that are wanted everywhere.
            wire: the format under way, if it is not the run's.

        Returns:
            The signals of all K peers in order, in float32: the residents' own tensors, live, and the others' copies.
            Those of peers that live in other jobs are empty.
        """
        placement, wire = self._placement, wire or self._wire
        own = {k: {name: x.float() for name, x in signals.items()} for k, signals in own.items()}
        group = _world() if everywhere else self.group
        if mode == "none" or group.size() == 1:
            alone = {f"all_{name}": name for name in everywhere}
            return [
                {**signals, **{new: signals[name] for new, name in alone.items()}, **_all_rows(labels)}
                if k in own
                else {}
                for k, signals in ((k, own.get(k, {})) for k in range(placement.num_peers))
            ]
        sent = {k: {name: x for name, x in signals.items() if name not in private} for k, signals in own.items()}
        if len(placement.groups) == 1:
            sent = {k: {name: signals[name] for name in everywhere} for k, signals in own.items()}
        if gathers(placement, share, everywhere=bool(everywhere)):
            shown, labels = self._gathered(sent, mode, everywhere, labels, wire, group)
        else:
            assert share is not None
            shown, labels = self._routed(sent, mode, share, everywhere, labels, wire, group)
        return [{**shown[k], **own.get(k, {}), **_all_rows(labels)} for k in range(placement.num_peers)]

    def whole(self, own: Mapping[int, Signals], *, wire: torch.dtype = torch.float32) -> Sequence[Signals]:
        """Tensors of any shapes, without gradient, equal on all ranks that hold a peer: see `ExchangeAfterStep`.

        One collective. Where the placement is even, an all-gather of everybody's; otherwise an all-to-all in which a
        rank gets what it lacks and no more: of each other group, a part from each of its ranks.
        """
        placement = self._placement
        if placement.is_even:
            return self(own, wire=wire)
        own = {k: {name: x.float() for name, x in signals.items()} for k, signals in own.items()}
        layout = self._layout(
            [[(name, tuple(x.shape)) for name, x in own[k].items()] for k in placement.residents], "whole"
        )
        sizes = [size_of(peers) for peers in layout]
        flat = torch.cat([x.detach().reshape(-1) for k in placement.residents for x in own[k].values()]).to(wire)
        held = [
            interval(sizes[g], 1, sum(h == g for h in self.groups[:i]), self.groups.count(g))
            for i, g in enumerate(self.groups)
        ]
        mine, others = held[self._own], [g != placement.group for g in self.groups]
        piece = flat[mine.start : mine.stop]
        out = [len(mine) * other for other in others]
        back = [len(part) * other for part, other in zip(held, others, strict=True)]
        got = all_to_all(piece.repeat(sum(others)), out, back, self.group).float().split(back)
        shown: dict[int, Signals] = dict(own)
        for g, peers in enumerate(layout):
            if g != placement.group:
                row = torch.cat([got[i] for i, h in enumerate(self.groups) if h == g])
                shown |= apart(row, peers)
        return [shown[k] for k in range(placement.num_peers)]

    def _gathered(
        self,
        sent: Mapping[int, Signals],
        mode: str,
        everywhere: Sequence[str],
        labels: tuple[Tensor, Tensor] | None,
        wire: torch.dtype,
        group: dist.ProcessGroup,
    ) -> tuple[dict[int, Signals], tuple[Tensor, Tensor] | None]:
        placement = self._placement
        if labels is not None:
            first = placement.residents[0]
            numbered = {"targets": as_digits(labels[0]), "ids": as_digits(labels[1])}
            sent = {**sent, first: {**sent[first], **numbered}}
        layout = self._layout(
            [[(name, tuple(x.shape)) for name, x in sent[k].items()] for k in placement.residents], "batch"
        )
        flat = torch.cat([x.reshape(-1) for k in placement.residents for x in sent[k].values()]).to(wire)
        longest = max(size_of(peers) for peers in layout)
        flat = torch.nn.functional.pad(flat, (0, longest - flat.numel()))
        gathered = (
            all_gather_with_gradient(flat, group) if mode == "differentiable" else all_gather(flat.detach(), group)
        )
        rows = gathered.float().unbind()
        # This rank's rows first, then those of the replicas after it, round and round.
        here, count = placement.replica, placement.replicas if everywhere else 1
        places = [
            [g.ranks[(here + j) % count] for g in placement.groups] if everywhere else self._speakers
            for j in range(count)
        ]
        replicas = [
            _together(apart(rows[place], peers) for place, peers in zip(each, layout, strict=True)) for each in places
        ]
        if labels is not None:
            first = placement.groups[0].peers[0]
            digits = [torch.cat([peers[first][name] for peers in replicas]) for name in ("targets", "ids")]
            labels = as_numbers(digits[0]), as_numbers(digits[1])
        return {
            k: {
                **{name: x for name, x in signals.items() if name not in ("targets", "ids")},
                **{f"all_{name}": torch.cat([peers[k][name] for peers in replicas]) for name in everywhere},
            }
            for k, signals in replicas[0].items()
        }, labels

    def _routed(
        self,
        sent: Mapping[int, Signals],
        mode: str,
        share: Share,
        everywhere: Sequence[str],
        labels: tuple[Tensor, Tensor] | None,
        wire: torch.dtype,
        group: dist.ProcessGroup,
    ) -> tuple[dict[int, Signals], tuple[Tensor, Tensor] | None]:
        placement, way = self._placement, self.levels.route(share, everywhere=bool(everywhere))
        layout = self._layout(
            [[(name, tuple(x.shape[1:])) for name, x in sent[k].items()] for k in placement.residents], "row"
        )
        near = [_only(peers, lambda name: name not in everywhere) for peers in layout]
        wide = [_only(peers, lambda name: name in everywhere) for peers in layout]
        numbered = 0 if labels is None else NUMBERS_OF_A_ROW
        widths = Widths(tuple(map(size_of, near)), tuple(map(size_of, wide)), numbered)
        block = block_of(sent, way, near, wide, labels)
        back = mode == "differentiable"
        send = all_to_all_with_gradient if back else _of_constants
        levels = self.levels.of(way, share, widths, wire.itemsize, group, everywhere=bool(everywhere), back=back)
        if levels is not None:
            got: Sequence[Tensor] = self.levels.exchanged(block, levels, widths, wire, send, group)
        else:
            out, come = (sizes.tolist() for sizes in way.sizes(widths))
            got = send(packed(block, way).to(wire), out, come, group).float().split(come)
        return unpacked(got, way, near, wide, numbered)

    def close(self) -> None:
        """Leaves the groups of ranks that it has used."""
        self.levels.close()
        leave(self.group)

    def _layout(self, mine: list[Shapes], of: str) -> list[dict[int, Shapes]]:
        """Shapes of every peer's signals, group by group. Peers may differ in widths, so ranks tell each other once for
        each set of shapes, and all of them meet a new set together."""
        key = of, tuple(tuple(shapes) for shapes in mine)
        if key not in self._layouts:
            told = self.gather_objects(mine, self.group)
            self._layouts[key] = [
                dict(zip(group.peers, told[place], strict=True))
                for group, place in zip(self._placement.groups, self._speakers, strict=True)
            ]
        return self._layouts[key]


def _world() -> dist.ProcessGroup:
    assert dist.group.WORLD is not None
    return dist.group.WORLD


def _of_constants(tensor: Tensor, sent: list[int], received: list[int], group: dist.ProcessGroup) -> Tensor:
    return all_to_all(tensor.detach(), sent, received, group)


def _only(peers: Mapping[int, Shapes], wanted: Callable[[str], bool]) -> dict[int, Shapes]:
    return {k: [(name, shape) for name, shape in shapes if wanted(name)] for k, shapes in peers.items()}


def _together(groups: Iterable[dict[int, Signals]]) -> dict[int, Signals]:
    return {k: signals for group in groups for k, signals in group.items()}


def _all_rows(labels: tuple[Tensor, Tensor] | None) -> dict[str, Tensor]:
    return {} if labels is None else {"all_targets": labels[0], "all_ids": labels[1]}

"""The one communication between peers in a step: everybody's signals in one flat buffer."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Literal

import torch
import torch.distributed as dist
from torch import Tensor

from engine.ranks.collectives import GatherObjects, all_gather, all_gather_with_gradient, gather_objects
from engine.ranks.placement import Placement
from losses import Signals

_Shapes = list[tuple[str, tuple[int, ...]]]


class Exchange:
    """Shows the signals of this rank's peers to the ranks that hold the others, and theirs to this rank."""

    def __init__(
        self,
        placement: Placement,
        group: dist.ProcessGroup,
        wire: torch.dtype = torch.float32,
    ) -> None:
        self._placement, self.group, self._wire = placement, group, wire
        self.gather_objects: GatherObjects = gather_objects
        """How ranks tell each other the shapes of what they show, once for each set of shapes."""
        self._layouts: dict[tuple[_Key, ...], list[list[_Shapes]]] = {}

    def __call__(
        self,
        own: Mapping[int, Signals],
        mode: Literal["none", "detached", "differentiable"] = "detached",
        *,
        private: Sequence[str] = (),
        everywhere: Sequence[str] = (),
        rows: tuple[Tensor, Tensor] | None = None,
        wire: torch.dtype | None = None,
    ) -> Sequence[Signals]:
        """One all-gather, or none where all that is asked for is here or `mode` is `none`: over the exchange group, or
        over the world where signals are wanted `everywhere`.

        Args:
            own: signals of each resident, every tensor of the same N rows on all ranks of the group.
            mode: `detached`: the other peers' signals are constants. `differentiable`: the gradients that other ranks
                have for this rank's signals come back in the backward pass. `none`: the others' signals stay empty.
            private: names of signals that are not sent.
            everywhere: names of signals that are wanted for the rows of all replicas too, see `AllRows.everywhere`.
            rows: the targets and ids of the N rows, int64 [N] each, which go with signals that are wanted everywhere.
            wire: the format under way, if it is not the run's.

        Returns:
            The signals of all K peers in order, in float32: the residents' own tensors, live, and the others' copies.
            Those of peers that live in other jobs are empty.
        """
        placement = self._placement
        own = {k: {name: x.float() for name, x in signals.items()} for k, signals in own.items()}
        group = _world() if everywhere else self.group
        if mode == "none" or group.size() == 1:
            alone = {f"all_{name}": name for name in everywhere}
            return [
                {**signals, **{new: signals[name] for new, name in alone.items()}, **_all_rows(rows)}
                if k in own
                else {}
                for k, signals in ((k, own.get(k, {})) for k in range(placement.num_peers))
            ]
        sent = {k: {name: x for name, x in signals.items() if name not in private} for k, signals in own.items()}
        if len(placement.groups) == 1:
            sent = {k: {name: signals[name] for name in everywhere} for k, signals in own.items()}
        if rows is not None:
            first = placement.residents[0]
            sent[first] = {**sent[first], "targets": _digits(rows[0]), "ids": _digits(rows[1])}
        layout = self._layout(sent)
        flat = torch.cat([x.reshape(-1) for k in placement.residents for x in sent[k].values()])
        flat = flat.to(wire or self._wire)
        longest = max(_numel(shapes) for shapes in layout)
        flat = torch.nn.functional.pad(flat, (0, longest - flat.numel()))
        if mode == "differentiable":
            gathered = all_gather_with_gradient(flat, group)
        else:
            gathered = all_gather(flat.detach(), group)
        replicas = gathered.float().view(len(layout), -1, longest).unbind(1)
        here = placement.replica if everywhere else 0
        # This rank's rows first, then those of the replicas after it, round and round.
        shown = [_unpack(replica, layout) for replica in (*replicas[here:], *replicas[:here])]
        if rows is not None:
            targets, ids = (_whole(torch.cat([peers[0][name] for peers in shown])) for name in ("targets", "ids"))
            rows = targets, ids
        return [
            {
                **own.get(k, {name: x for name, x in shown[0][k].items() if name not in ("targets", "ids")}),
                **{f"all_{name}": torch.cat([peers[k][name] for peers in shown]) for name in everywhere},
                **_all_rows(rows),
            }
            for k in range(placement.num_peers)
        ]

    def _layout(self, own: Mapping[int, Signals]) -> list[list[_Shapes]]:
        """Shapes of every peer's signals, group by group. Peers may differ in widths, so ranks tell each other once for
        each set of shapes; the rows are the same on all ranks of the group, so all of them meet a new set together."""
        mine = [[(name, tuple(x.shape)) for name, x in own[k].items()] for k in self._placement.residents]
        key = tuple(tuple(shapes) for shapes in mine)
        if key not in self._layouts:
            self._layouts[key] = self.gather_objects(mine, self.group)
        return self._layouts[key]


def _world() -> dist.ProcessGroup:
    assert dist.group.WORLD is not None
    return dist.group.WORLD


_Key = tuple[tuple[str, tuple[int, ...]], ...]


def _numel(peers: list[_Shapes]) -> int:
    return sum(torch.Size(shape).numel() for shapes in peers for _, shape in shapes)


def _unpack(rows: Tensor, layout: list[list[_Shapes]]) -> list[Signals]:
    """[P, S] of one replica -> the signals of all K peers."""
    peers: list[Signals] = []
    for row, shapes in zip(rows, layout, strict=True):
        sizes = [torch.Size(shape).numel() for peer in shapes for _, shape in peer]
        pieces = iter(row[: sum(sizes)].split(sizes))
        peers += [{name: next(pieces).view(shape) for name, shape in peer} for peer in shapes]
    return peers


_DIGITS = 4
NUMBERS_OF_A_ROW = 2 * _DIGITS
"""What a row's target and id are sent as."""


def _digits(numbers: Tensor) -> Tensor:
    """int64 [N] in 0 .. 2^32 - 1 -> its digits to the base 256, float32 [N, 4], which bf16 keeps exactly too."""
    return torch.stack([numbers >> 8 * place & 255 for place in range(_DIGITS)], 1).float()


def _whole(digits: Tensor) -> Tensor:
    return sum(digits[:, place].long() << 8 * place for place in range(_DIGITS))  # type: ignore[return-value]


def _all_rows(rows: tuple[Tensor, Tensor] | None) -> dict[str, Tensor]:
    return {} if rows is None else {"all_targets": rows[0], "all_ids": rows[1]}

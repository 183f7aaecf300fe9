"""The one communication between peers in a step: everybody's signals in one flat buffer."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Literal

import torch
import torch.distributed as dist
from torch import Tensor

from engine.collectives import all_gather, all_gather_with_gradient
from engine.placement import Placement
from losses import Signals

_Shapes = list[tuple[str, tuple[int, ...]]]


class Exchange:
    """Shows the signals of this rank's peers to the ranks that hold the others, and theirs to this rank."""

    def __init__(self, placement: Placement, group: dist.ProcessGroup, wire: torch.dtype = torch.float32) -> None:
        self._placement, self.group, self._wire = placement, group, wire
        self._layouts: dict[tuple[_Key, ...], list[list[_Shapes]]] = {}

    def __call__(
        self,
        own: Mapping[int, Signals],
        mode: Literal["none", "detached", "differentiable"] = "detached",
        *,
        private: Sequence[str] = (),
        wire: torch.dtype | None = None,
    ) -> Sequence[Signals]:
        """One all-gather over the exchange group, or none where all peers live here or `mode` is `none`.

        Args:
            own: signals of each resident, every tensor of the same N rows on all ranks of the group.
            mode: `detached`: the other peers' signals are constants. `differentiable`: the gradients that other ranks
                have for this rank's signals come back in the backward pass. `none`: the others' signals stay empty.
            private: names of signals that are not sent.
            wire: the format under way, if it is not the run's.

        Returns:
            The signals of all K peers in order, in float32: the residents' own tensors, live, and the others' copies.
            Those of peers that live in other jobs are empty.
        """
        own = {k: {name: x.float() for name, x in signals.items()} for k, signals in own.items()}
        if self._placement.groups == 1:
            return [own.get(k, {}) for k in range(self._placement.num_peers)]
        if mode == "none":
            return [own.get(k, {}) for k in range(self._placement.num_peers)]
        shown = {k: {name: x for name, x in signals.items() if name not in private} for k, signals in own.items()}
        layout = self._layout(shown)
        flat = torch.cat([x.reshape(-1) for k in self._placement.residents for x in shown[k].values()])
        flat = flat.to(wire or self._wire)
        longest = max(_numel(group) for group in layout)
        flat = torch.nn.functional.pad(flat, (0, longest - flat.numel()))
        if mode == "differentiable":
            gathered = all_gather_with_gradient(flat, self.group)
        else:
            gathered = all_gather(flat.detach(), self.group)
        signals = [peer for row, shapes in zip(gathered.float(), layout, strict=True) for peer in _unpack(row, shapes)]
        return [own.get(k, signals[k]) for k in range(self._placement.num_peers)]

    def _layout(self, own: Mapping[int, Signals]) -> list[list[_Shapes]]:
        """Shapes of every peer's signals, group by group. Peers may differ in widths, so ranks tell each other once for
        each set of shapes; the rows are the same on all ranks of the group, so all of them meet a new set together."""
        mine = [[(name, tuple(x.shape)) for name, x in own[k].items()] for k in self._placement.residents]
        key = tuple(tuple(shapes) for shapes in mine)
        if key not in self._layouts:
            layout: list[list[_Shapes]] = [[] for _ in range(self._placement.groups)]
            dist.all_gather_object(layout, mine, group=self.group)
            self._layouts[key] = layout
        return self._layouts[key]


_Key = tuple[tuple[str, tuple[int, ...]], ...]


def _numel(peers: list[_Shapes]) -> int:
    return sum(torch.Size(shape).numel() for shapes in peers for _, shape in shapes)


def _unpack(row: Tensor, peers: list[_Shapes]) -> list[Signals]:
    sizes = [torch.Size(shape).numel() for shapes in peers for _, shape in shapes]
    pieces = iter(row[: sum(sizes)].split(sizes))
    return [{name: next(pieces).view(shape) for name, shape in shapes} for shapes in peers]

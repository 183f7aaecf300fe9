"""The contract between a method and the engine.

A method never sees a rank, a group or a device. It says which signals the peers show each other, is given the signals
of all K peers, and returns the terms of the joint objective that depend on the peers that live here. The gradient of
their sum with respect to those peers' parameters then *is* the gradient of the joint objective, so the backward pass
needs no communication between peers.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, NamedTuple, Protocol

import torch
from pydantic import BaseModel, ConfigDict
from torch import Tensor, nn

Signals = Mapping[str, Tensor]
"""What one peer shows for one batch: name -> tensor, rows first. `logits` [N, C] is always there."""

Terms = dict[tuple[int | None, str], Tensor]
"""(peer, or None for a term of the whole cohort; name of the term) -> weighted scalar."""


class MethodOptions(BaseModel):
    """The keys of `method:` in a config. A subclass narrows `name` to its own name and adds the method's options."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, allow_inf_nan=False)

    name: str


@dataclass(frozen=True)
class PeerInfo:
    """What a method may know of a peer when it builds the peer's head."""

    index: int
    num_classes: int
    num_features: int
    """Width of `features`, the pooled vector that enters the peer's classifier."""
    stages: Sequence[tuple[int, int]]
    """(channels, side in pixels) of the feature map of each stage 1 .. S."""
    auxiliary: Callable[[int, str], nn.Module]
    """Builds an auxiliary classifier with weights of its own that goes on after stage j: the map of stage j ->
    {`logits` [N, C], `features` [N, D]}. The second argument names the design, see `models.heads.auxiliary`."""
    projection: Callable[[int, int], nn.Module]
    """Builds an embedding head [N, inputs] -> [N, outputs], rows of unit length, see `models.heads.Projection`."""
    network: Callable[[], nn.Module]
    """Builds the peer's plain network once more, with random weights: images [N, channels, H, W] -> logits [N, C]."""


class Progress(NamedTuple):
    """Where the run is. Ramps and schedules are functions of it, so that they need no state of their own."""

    step: int
    """Optimiser steps done."""
    steps_per_epoch: int
    epochs: int

    @property
    def epoch(self) -> int:
        """The epoch under way, counted from 0."""
        return self.step // self.steps_per_epoch


class Table(Protocol):
    """Rows of numbers that all ranks read and write alike, wherever they lie."""

    def read(self, ids: Tensor) -> Tensor:
        """int64 [...] -> float32 [..., d], constant. Every rank must call it equally often, each with its own ids."""

    def write(self, ids: Tensor, rows: Tensor) -> None:
        """Puts [M, d] in the places [M], which differ from each other. Every rank must call it with the same."""


class MakeTable(Protocol):
    """Builds tables."""

    def __call__(
        self,
        size: int,
        width: int,
        dtype: torch.dtype,
        initial: Callable[[Tensor], Tensor],
        *,
        sharded: bool = False,
        apart: bool = False,
    ) -> Table:
        """A table, which is an nn.Module and is saved with the run.

        Args:
            size: n, the number of rows.
            width: d.
            dtype: number format of the rows.
            initial: int64 [M] -> what stands in these rows at first, float32 [M, d].
            sharded: whether each rank keeps only a part of the rows.
            apart: whether each rank begins with other rows; reading and writing are as ever.
        """


class Exchange(Protocol):
    """The exchange after a step. Every rank must call it equally often."""

    def __call__(self, own: Mapping[int, Signals], *, wire: torch.dtype = torch.float32) -> Sequence[Signals]:
        """Takes named tensors of each resident, gives those of all K peers in float32, by one all-gather.

        Where peers are jobs of their own (`Method.shown_apart`) they leave their tensors in a folder and take those of
        the others as they lie there: nobody waits, and a peer of which nothing new has come has no tensors, {}.

        Args:
            own: of any shapes. A resident's own tensors come back as they are, not rounded to the wire's format.
            wire: number format under way, whatever the one that signals travel in.
        """


@dataclass(frozen=True)
class AfterStep:
    """What a method may use after an optimiser step, wherever the peers are."""

    residents: Mapping[int, nn.Module]
    """The peers that live here, by index: network and head. Their parameters may be written in place."""
    exchange: Exchange
    average_buffers: Callable[[], None]
    """Makes the residents' BatchNorm statistics those of all rows, as they are where the run is evaluated or saved: one
    all-reduce in each replica group of several ranks. Every rank must call it equally often."""
    everywhere: Sequence[Sequence[Signals]]
    """For each micro-batch, the `all_NAME` of every peer that `Method.everywhere` asked for, without gradient."""
    skipped: Tensor
    """[1] on the device, 1 where no optimiser has moved because some rank met a non-finite number."""
    images: Tensor
    targets: Tensor
    progress: Progress


@dataclass(frozen=True)
class OuterStep:
    """What an outer step may use: the residents as functions of their parameters, wherever the other peers are."""

    parameters: Mapping[int, Mapping[str, Tensor]]
    """Of each resident, by name, after the optimiser step: `network....` and `head....`, those of `outer` included."""
    outer: Mapping[int, Sequence[str]]
    """The names of each resident's parameters that `Method.outer` chose."""
    show: Callable[[Mapping[int, Mapping[str, Tensor]]], Sequence[Signals]]
    """Parameters of the residents -> the signals of all K peers for the rows of the step, as in `Method.forward`. The
    gradient, and the gradient of the gradient, reaches the residents' parameters and travels to the other peers' ranks:
    of the sum of what all ranks differentiate. BatchNorm uses the batch's statistics and keeps none. Every rank must
    call it, and differentiate, equally often."""
    average: Callable[[Mapping[int, Sequence[Tensor]]], dict[int, list[Tensor]]]
    """The mean of the residents' tensors over all replicas, without gradient: one all-reduce."""
    lr: float
    """The residents' learning rate in this step."""
    momentum: float
    weight_decay: Mapping[int, Mapping[str, float]]
    """Of each resident's parameters, by name."""
    targets: Tensor
    progress: Progress


class Method(nn.Module, ABC):
    """A published way to couple peers.

    Modules that all peers share (a gate, an ensemble classifier) are ordinary submodules: every rank sees all signals,
    computes their full gradient and the engine averages it over all ranks. They are saved with the run, buffers too.
    """

    name: ClassVar[str]
    Options: ClassVar[type[MethodOptions]]
    signals: ClassVar[tuple[str, ...]] = ("logits",)
    """What the peers show each other. Known to every peer: `logits` [N, C], `features` [N, D] and the tapped maps
    `stage1` ...; a head adds more."""
    private: tuple[str, ...] = ()
    """Those of `signals`, and of what `look` shows, that a peer keeps to itself: nothing of them is sent."""
    exchange: Literal["none", "detached", "differentiable"] = "detached"
    """Whether signals of other peers come without gradient or carry it back to their owner; `none` sends nothing. Where
    they carry it, the terms of a rank are its share of the objective, and all ranks' shares must use all signals."""

    everywhere: tuple[str, ...] = ()
    """Those of `signals` that come for all rows of the global batch as well, as `all_NAME` [G, ...], and with them
    `all_targets` and `all_ids`, int64 [G], the position of each image in the training split. This rank's rows come
    first, in their order. Nothing more is sent than the signals, the targets and the ids."""

    alike: ClassVar[bool] = False
    """Whether all peers must have the same network and options, as where their parameters meet one by one."""

    def __init__(self, options: Any, peers: Sequence[PeerInfo]) -> None:
        super().__init__()
        self.options = options
        self.num_peers = len(peers)

    @classmethod
    def check(cls, options: Any, num_peers: int) -> None:
        """Refuses a cohort that this method cannot train.

        Raises:
            ValueError: with what was found and what the method needs.
        """

    @classmethod
    def taps(cls, options: Any, num_stages: int) -> Sequence[int]:
        """The stages, 1 .. S, whose feature maps `stage1` ... are shown to a peer's head."""
        return ()

    @classmethod
    def trunk(cls, options: Any, num_stages: int) -> int | None:
        """The last stage that all peers share, if they share any: peers are then branches of one network.

        The trunk's map is there for the residents as `trunk` [N, channels, side, side]; it is not exchanged.
        """
        return None

    deployed: ClassVar[Literal["first", "best", "mean", "leader", "ema", "ensemble"]] = "mean"
    """Whose accuracy the paper reports, see `report.deployed` of a config."""

    trunk_gradient: ClassVar[Literal["sum", "mean"]] = "sum"
    """Whether the shared trunk follows the sum of the peers' gradients or their mean."""

    one_view: ClassVar[bool] = False
    """Whether all peers must see one augmentation of an image, as where a module that they share looks at `trunk`."""

    @classmethod
    def weight_decay(cls, options: Any) -> float | None:
        """Weight decay of the modules that all peers share, where it is not that of the networks."""
        return None

    def head(self, peer: PeerInfo) -> nn.Module | None:
        """Builds what is attached to one peer and left behind at export: {`logits`, `features`, maps} -> further
        signals."""
        return None

    @classmethod
    def teacher_decay(cls, options: Any, step: int) -> float | None:
        """Gives each peer a teacher: a moving average of its parameters, theta' <- phi theta' + (1 - phi) theta.

        The teacher is a copy of the peer's whole network, trunk included. It runs in training mode and without gradient
        on the images that the peer sees, so that its BatchNorm statistics are its own, and shows its logits as the
        signal `teacher` [N, C]. It is saved, evaluated and exported as the peer's average. Needs one turn.

        Returns:
            phi after update number `step`, from 0; None: there are no teachers.
        """
        return None

    @classmethod
    def turns(cls, options: Any, num_peers: int) -> Sequence[Sequence[int]]:
        """The peers that are updated together, turn after turn; signals are refreshed between turns."""
        return (range(num_peers),)

    def look(self, images: Mapping[int, Tensor], progress: Progress) -> Mapping[int, Signals]:
        """Further signals of the residents, made here from the images that they see, without gradient.

        Args:
            images: [N, channels, H, W] that each resident sees; the same tensor where views are shared.
            progress: of the run.
        """
        return {}

    @abstractmethod
    def forward(
        self, residents: Sequence[int], signals: Sequence[Signals], targets: Tensor, progress: Progress
    ) -> Terms:
        """The terms of the joint objective that depend on `residents`.

        Args:
            residents: the peers of this turn that live here; their signals are live.
            signals: those of all K peers, in order, for the same N rows, in float32.
            targets: class indices [N].
            progress: of the run.
        """

    def prepare(self, classes: Tensor, make_table: MakeTable) -> None:
        """Before training: takes what it needs to know of the data set. Submodules made here are saved with the run.

        Args:
            classes: int64 [n], the class of each training image by its position in the split; -1 for images that are
                never trained on.
            make_table: builds what is too large for every rank, or written by all.

        Raises:
            ValueError: the data set is not fit for the method, naming what is missing.
        """

    def kept_apart(self, head: nn.Module) -> Sequence[nn.Parameter]:
        """The parameters of a peer's head that replicas begin with differently and whose gradients they do not average,
        as some published code does. The numbers then depend on the placement, and the first replica's are saved."""
        return ()

    def outer(self, head: nn.Module) -> Sequence[nn.Parameter]:
        """The parameters of a peer's head that the step leaves alone and that `outer_step` has gradients for. They have
        an optimiser of their own, with the settings and schedule of the peer's."""
        return ()

    def outer_step(self, outer: OuterStep) -> Mapping[int, Sequence[Tensor]] | None:
        """After the optimiser step and `after_step`: gradients for each resident's parameters `outer`, in order; they
        are averaged over the replicas. None where none is due, which only the progress may decide."""
        return None

    @classmethod
    def held_out(cls, options: Any) -> bool:
        """Whether the method looks, before each epoch but the first, at images that no peer is trained on."""
        return False

    def survey(self, signals: Sequence[Signals], targets: Tensor) -> Tensor:
        """What the method takes from some of the held-out images: added up over all of them, each once.

        Args:
            signals: `logits` of all K peers, in evaluation mode and without gradient.
            targets: class indices [N].

        Returns:
            A number for each pair of peers, float64 [K, K].
        """
        raise NotImplementedError

    def begin_epoch(self, surveyed: Tensor) -> None:
        """Before each epoch but the first: takes the mean of `survey` over the held-out images, the same bits on every
        rank, and keeps in buffers what it makes of it."""

    def after_step(self, after: AfterStep) -> None:
        """Acts after the optimiser step: parameter communication, moving-average teachers, an outer step."""

    def shown_apart(self) -> Sequence[Mapping[str, tuple[int, ...]]]:
        """The shapes, by name, of what each of the K peers shows the others in `after_step`.

        Whoever has this lets peers be jobs of their own, which exchange nothing else (`exchange = "none"`) and must do
        with what has come. What another job has left is used only if it is of these shapes.
        """
        raise NotImplementedError

    @classmethod
    def meets(cls) -> bool:
        """Whether peers may be jobs of their own, see `shown_apart`."""
        return cls.shown_apart is not Method.shown_apart

"""The contract between a method and the engine: what every method has. What few need is in `losses.capabilities`.

A method never sees a rank, a group or a device. It says which signals the peers show each other, is given the signals
of all K peers, and returns the terms of the joint objective that depend on the peers that live here. The gradient of
their sum with respect to those peers' parameters then *is* the gradient of the joint objective, so the backward pass
needs no communication between peers.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, NamedTuple

from pydantic import BaseModel, ConfigDict
from torch import Tensor, nn

from losses.functional import cross_entropy

Signals = Mapping[str, Tensor]
"""What one peer shows for one batch: name -> tensor, rows first. Of a peer that lives here `logits` [N, C] is always
there; of another what is sent, and nothing where a method sends nothing."""

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


class Method(nn.Module, ABC):
    """A published way to couple peers.

    Modules that all peers share (a gate, an ensemble classifier) are ordinary submodules: every rank sees all signals,
    computes their full gradient and the engine averages it over all ranks. They are saved with the run, buffers too.
    """

    name: ClassVar[str]
    Options: ClassVar[type[MethodOptions]]

    signals: ClassVar[tuple[str, ...]] = ("logits",)
    """What the peers show each other. Known to every peer: `logits` [N, C], `features` [N, D]; a head and capabilities
    add more."""
    private: tuple[str, ...] = ()
    """Those signals that a peer keeps to itself: nothing of them is sent."""
    exchange: Literal["none", "detached", "differentiable"] = "detached"
    """Whether signals of other peers come without gradient or carry it back to their owner; `none` sends nothing. Where
    they carry it, the terms of a rank are its share of the objective, and all ranks' shares must use all signals."""
    frozen_hindrance: ClassVar[str | None] = None
    """Why no peer may be a trained network that shows signals and learns nothing, beside what `losses.frozen` knows of
    any method. Such a peer is never among `residents`."""
    deployed: ClassVar[Literal["first", "best", "mean", "leader", "ema", "ensemble"]] = "mean"
    """Whose accuracy the paper reports, see `report.deployed` of a config."""

    def __init__(self, options: Any, peers: Sequence[PeerInfo]) -> None:
        super().__init__()
        self.options = options
        self.num_peers = len(peers)
        self.classify: Callable[..., Tensor] = cross_entropy
        """How logits are held against the targets, `train.loss` of a config: logits [N, C], targets -> scalar."""

    @classmethod
    def check(cls, options: Any, num_peers: int) -> None:
        """Refuses a cohort that this method cannot train.

        Raises:
            ValueError: with what was found and what the method needs.
        """

    @classmethod
    def needs_classes(cls, options: Any) -> bool:
        """Whether it has to know of which one class an image is. Such a method is refused where images are mixed or
        labels smoothed; all others take targets of either form."""
        return False

    @classmethod
    def compile_hindrance(cls, options: Any) -> str | None:
        """Why `precision.compile` leaves `forward` alone with these options; None where it is compiled, as one graph.

        `progress.step` is then an int64 tensor []: what is reckoned from it may weigh terms, as `ramp_up` of
        `losses.functional` does, and what decides by it is no graph. That is found, said, and left alone as well.
        """
        return None

    def head(self, peer: PeerInfo) -> nn.Module | None:
        """Builds what is attached to one peer and left behind at export: {`logits`, `features`, maps} -> further
        signals."""
        return None

    @abstractmethod
    def forward(
        self, residents: Sequence[int], signals: Sequence[Signals], targets: Tensor, progress: Progress
    ) -> Terms:
        """The terms of the joint objective that depend on `residents`.

        Args:
            residents: the peers of this turn that live here; their signals are live.
            signals: those of all K peers, in order, for the same N rows, in float32.
            targets: class indices [N], or probabilities [N, C] where labels are smoothed or images mixed.
            progress: of the run.
        """

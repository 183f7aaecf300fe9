"""The update of a step as one CUDA graph: forward of all peers, objective, backward and optimisers, in one launch."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from data_pipelines import Batch
from engine.cohort.cohort import Cohort
from engine.cohort.optim import fusible
from engine.cohort.randomness import Streams
from engine.config import RunConfig
from engine.training.step import Update, update_peers
from engine.training.timing import Clock
from losses import METHODS, Progress
from losses.capabilities import LooksAtImages
from losses.contrast import ContrastiveOptions

WARM = 3
"""Updates before one is captured: kernels are chosen, and optimisers make their state, in the first ones."""

WARM_RANKS = 11
"""The same where there are several ranks: DDP times its first ten."""


def hindrance(config: RunConfig) -> str | None:
    """Why the updates of a run cannot be captured; None where they can, by all that a config says."""
    method = METHODS[config.method.name]
    if config.precision.amp == "fp16":
        return "precision.amp = fp16 has the host decide by the loss scale; bf16 does not"
    for name in dict.fromkeys(config.optimizer_of(peer).name for _, peer in config.cohort):
        if not fusible(name):
            return f"the host waits for optimizer.name = {name} in every update, which PyTorch has not fused"
    if isinstance(config.method, ContrastiveOptions) and config.method.negatives == "memory":
        return "method.negatives = memory draws by the number of the step"
    if issubclass(method, LooksAtImages):
        return f"{method.name} looks at other networks from some step on"
    return None


@dataclass
class Graphed:
    """Does what `update_peers` does, on tensors that stay where they are; on CUDA captured, and replayed.

    Batches are copied into the same tensors in each step, and learning rates are numbers on the device. All else that
    the host decides is constant within an epoch, and for batches of one shape; after either an update is captured anew.
    On the CPU nothing is captured: an update reads the same static tensors, operation by operation.

    What ranks say to each other within an update is part of it. NCCL takes it from graphs on all ranks or on none, so
    ranks agree before each capture and after it: what hinders one of them hinders all.

    Attributes:
        say: told, once, why updates are not captured after all.
    """

    say: Callable[[str], None]
    _key: Any = None
    _static: list[Batch] = field(default_factory=list)
    _stop: Tensor | None = None
    _rates: list[Tensor] = field(default_factory=list)
    _graph: torch.cuda.CUDAGraph | None = None
    _update: Update | None = None
    _warm: int = 0
    _fit: bool = False
    _hindrance: str | None = None
    _given_up: bool = False

    def __call__(
        self, cohort: Cohort, batches: Sequence[Batch], progress: Progress, clock: Clock, stop: Tensor
    ) -> Update:
        """See `update_peers`. What is returned holds until the next call."""
        if self._given_up:
            return update_peers(cohort, batches, progress, clock, stop)
        key = progress.epoch, tuple(x.shape for batch in batches for x in (*batch.views, batch.targets))
        if key != self._key:
            self._key, self._graph, self._update, self._fit = key, None, None, False
            self._static = [Batch(tuple(map(torch.clone, b.views)), b.targets.clone(), b.ids.clone()) for b in batches]
        self._fill(batches, stop)
        assert self._stop is not None
        rates = _rates(cohort)
        with _RatesOnDevice(cohort, self._hold(rates, cohort.device)):
            if self._graph is None:
                if self._warm < (WARM if cohort.placement.world == 1 else WARM_RANKS):
                    self._warm += 1
                    return self._watched(cohort, progress, clock)
                if not self._fit:
                    self._fit = self._agreed(self._hindrance or _silence(cohort))
                if not self._fit or (cohort.device.type == "cuda" and not self._capture(cohort, progress)):
                    return update_peers(cohort, batches, progress, clock, stop)
                if self._graph is None:
                    return update_peers(cohort, self._static, progress, clock, self._stop)
        assert self._graph is not None
        assert self._update is not None
        self._graph.replay()
        clock.mark("backward")  # and all before it, which nothing tells apart
        outcome = self._update.outcome
        return self._update._replace(outcome=outcome._replace(skipped=outcome.skipped.clone()))

    @property
    def captured(self) -> bool:
        """Whether the update of the last step was a graph."""
        return self._graph is not None

    def _fill(self, batches: Sequence[Batch], stop: Tensor) -> None:
        if self._stop is None:
            self._stop = stop.clone()
        self._stop.copy_(stop)
        for static, batch in zip(self._static, batches, strict=True):
            torch._foreach_copy_([*static.views, static.targets, static.ids], [*batch.views, batch.targets, batch.ids])

    def _hold(self, rates: Sequence[float], device: torch.device) -> list[Tensor]:
        if not self._rates:
            # Kernels on a GPU read a float32; on a CPU the number that they are given otherwise.
            dtype = torch.float32 if device.type == "cuda" else torch.float64
            self._rates = [torch.zeros((), device=device, dtype=dtype) for _ in rates]
        for tensor, rate in zip(self._rates, rates, strict=True):
            tensor.fill_(rate)
        return self._rates

    def _watched(self, cohort: Cohort, progress: Progress, clock: Clock) -> Update:
        """An update that is not captured, in which nobody may draw."""
        assert self._stop is not None
        streams = cohort.streams
        cohort.streams = listening = _Listening(streams.seed, streams.num_peers, streams.replica, streams.device)
        try:
            found = update_peers(cohort, self._static, progress, clock, self._stop)
        finally:
            cohort.streams = streams
        if listening.drew():
            self._hindrance = "networks or the method draw random numbers in it, such as dropout"
        return found

    def _capture(self, cohort: Cohort, progress: Progress) -> bool:
        assert self._stop is not None
        streams, graph, hindrance = cohort.streams, torch.cuda.CUDAGraph(), None
        cohort.streams = _Silent(streams.seed, streams.num_peers, streams.replica, streams.device)
        try:
            # Other threads, which save or load meanwhile, are not part of it.
            with torch.cuda.graph(graph, capture_error_mode="thread_local"):
                self._update = update_peers(cohort, self._static, progress, _NoClock(cohort.device), self._stop)
        except RuntimeError as error:
            hindrance = str(error).strip().partition("\n")[0]
        finally:
            cohort.streams = streams
        if self._agreed(hindrance):
            self._graph = graph
        return self._graph is not None

    def _agreed(self, hindrance: str | None) -> bool:
        """Whether nothing hinders any rank; what does is said, and that was the last try. All ranks call this."""
        everyone: list[str | None] = [None] * dist.get_world_size()
        dist.all_gather_object(everyone, hindrance)
        reason = next((found for found in everyone if found is not None), None)
        if reason is not None:
            self._given_up = True
            how = "updates are not captured, but launched one operation after another"
            self.say(f"precision.graphs = on: {how}: {reason}")
        return reason is None


def _silence(cohort: Cohort) -> str | None:
    """Why what ranks say to each other is no part of a graph on this cohort's device; None where it can be."""
    if cohort.placement.world == 1 or cohort.device.type != "cuda":
        return None
    name = dist.group.WORLD._get_backend(cohort.device).name()  # type: ignore[union-attr]
    return None if name == "nccl" else f"ranks talk by {name}, which waits for the host"


def _rates(cohort: Cohort) -> list[float]:
    return [group["lr"] for optimizer in cohort.optimizers() for group in optimizer.param_groups]


@dataclass
class _RatesOnDevice:
    """Within, optimisers read their learning rates from tensors; outside they are the numbers that schedules set."""

    cohort: Cohort
    tensors: Sequence[Tensor]

    def __enter__(self) -> None:
        self._numbers = _rates(self.cohort)
        self._set(self.tensors)

    def __exit__(self, *_: object) -> None:
        self._set(self._numbers)

    def _set(self, values: Sequence[Any]) -> None:
        groups = [group for optimizer in self.cohort.optimizers() for group in optimizer.param_groups]
        for group, value in zip(groups, values, strict=True):
            group["lr"] = value


@dataclass(frozen=True)
class _Listening(Streams):
    """Seeds as ever, and notes whether anything was drawn after."""

    _notes: dict[str, Any] = field(default_factory=lambda: {"drew": False, "state": None})

    def _before_forward(self, stream: int, step: int, micro: int) -> None:
        self.drew()
        super()._before_forward(stream, step, micro)
        self._notes["state"] = self._state()

    def drew(self) -> bool:
        before = self._notes["state"]
        if before is not None:
            self._notes["drew"] |= not torch.equal(before, self._state())
        return bool(self._notes["drew"])

    def _state(self) -> Tensor:
        if self.device.type == "cuda":
            return torch.cuda.default_generators[self.device.index].get_state()
        return torch.default_generator.get_state()


class _Silent(Streams):
    """Seeds nothing: while it captures, a generator takes no seed."""

    def _before_forward(self, stream: int, step: int, micro: int) -> None:
        pass


class _NoClock(Clock):
    """Marks nothing: events within a graph tell no time."""

    def mark(self, name: str) -> None:
        pass

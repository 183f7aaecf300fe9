"""A whole step of any rank of any run, on tensors that have shapes and no numbers, in a world that is not there.

What a GPU would trip over shows without one: tensors on another device than the rest, places where the host would wait
for a number, shapes that do not fit; and how much memory the step takes.
"""

from __future__ import annotations

import contextlib
import math
import traceback
import weakref
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from data_pipelines import Batch
from engine.cohort.cohort import Cohort
from engine.cohort.optim import fusible
from engine.config import RunConfig
from engine.ranks.placement import Placement
from engine.ranks.tables import ShardedTable, WholeTable, make_table
from engine.training.step import blank, train_step
from engine.training.timing import Clock
from losses import Progress
from losses.capabilities import Tables
from models.shapes_alone import shapes_alone
from models.told_again import ToldAgain, tensors

META = torch.device("meta")
_ROOT = str(Path(__file__).parents[1])
_WATCHING = (__file__, f"{_ROOT}/models/shapes_alone.py", f"{_ROOT}/models/told_again.py")


class RehearsalError(RuntimeError):
    """A step cannot be made as it is on a GPU. The message names the line and what is wrong with it."""


@dataclass(frozen=True)
class Images:
    """What of a data set matters to a step."""

    num_classes: int
    channels: int
    side: int
    """In pixels."""
    count: int
    """Of the training split."""


@dataclass(frozen=True)
class Memory:
    """What a rank holds, in bytes. What cuDNN, NCCL, the decoder and the allocator take comes on top."""

    weights: int
    """Parameters and buffers of the peers here, their heads, and what all peers share."""
    gradients: int
    optimizer: int
    averages: int
    """Moving averages and teachers."""
    tables: int
    """Rows of memory banks."""
    activations: int
    """What a step makes and lets go of, at its peak, but for the gradients and the exchange."""
    exchange: int
    """What is made to send and receive, at its peak."""
    total: int
    """At the peak of a step: all that stands, and what the step adds. The peaks of the parts need not coincide."""


@dataclass(frozen=True)
class Rehearsal:
    """What a step of one rank came to."""

    memory: Memory
    operations: int
    """Operations that torch dispatched."""
    waits: tuple[str, ...]
    """Where the host would wait for the device, or send it something that it has to wait for: lines of this project."""


def rehearse(config: RunConfig, placement: Placement, images: Images, steps: Sequence[int] = (0, 1)) -> Rehearsal:
    """Makes steps of the rank that `placement` is the place of; the last of them is measured.

    Args:
        config: of the run. Weights that it starts from are not read.
        placement: of the rank.
        images: of the data set.
        steps: numbers of the updates, from 0.

    Raises:
        RehearsalError: something of it would fail on a GPU.
        ValueError: what the method refuses.
    """
    placement = replace(placement, per_node=None)  # There are no others to agree with on how ranks lie on nodes.
    # Peers that are jobs of their own meet in files, of which there are none here: as one job, a rank each.
    if placement.only is not None:
        placement = Placement.even(placement.num_peers, 1, placement.num_peers, placement.only)
        config = config.model_copy(update={"placement": type(config.placement)()})
    kinds = {(peer.network, repr(peer.options)) for _, peer in config.cohort}
    told: list[list[Any]] = []
    groups = placement.groups
    if len(groups) > 1 and len(kinds) > 1:
        told = [_told(config, placement.of(group.ranks[0]), images) for group in groups]
    with shapes_alone(), _world(placement):
        cohort = _cohort(config, placement, images)
        answers = iter(zip(*told, strict=False))
        of_ranks = [placement.of(rank).group for rank in placement.exchange_ranks]

        def tell(mine: Any, _: object) -> list[Any]:
            answer = next(answers, [mine] * len(groups))
            return [answer[g] for g in of_ranks]

        cohort.exchange.gather_objects = tell
        return _step(cohort, config, placement, steps)


@contextlib.contextmanager
def _world(placement: Placement) -> Iterator[None]:
    # torch's own stand-in for a world; it has no public name, as nobody but tests was meant to want one.
    from torch.testing._internal.distributed.fake_pg import FakeStore

    dist.init_process_group("fake", store=FakeStore(), rank=placement.rank, world_size=placement.world)
    try:
        yield
    finally:
        dist.destroy_process_group()


@contextlib.contextmanager
def open_rehearsed(config: RunConfig, placement: Placement, images: Images) -> Iterator[Cohort]:
    """The cohort of a rank, without numbers, in a world that is not there."""
    with shapes_alone(), _world(placement):
        yield _cohort(config, placement, images)


def _cohort(config: RunConfig, placement: Placement, images: Images) -> Cohort:
    steps_per_epoch = max(1, images.count // config.data.global_batch)
    cohort = Cohort(
        config,
        placement,
        META,
        num_classes=images.num_classes,
        channels=images.channels,
        image_size=images.side,
        steps_per_epoch=steps_per_epoch,
    )
    if isinstance(cohort.method, Tables):
        # Which class an image is of decides what is drawn, so that alone has numbers, as long as it is looked at.
        cohort.method.prepare(torch.arange(images.count) % images.num_classes, partial(make_table, META))
        cohort.method.to(META)
    return cohort


def _batches(cohort: Cohort) -> list[Batch]:
    return [blank(cohort, len(share.rows)) for share in cohort.shares]


def _told(config: RunConfig, placement: Placement, images: Images) -> list[Any]:
    """What a rank would tell the others of the shapes that it shows, in the order in which it is asked."""
    told: list[Any] = []

    def heard(mine: Any, group: object) -> list[Any]:
        told.append(mine)
        return [mine] * len(placement.exchange_ranks)

    with shapes_alone(), _world(placement):
        cohort = _cohort(config, placement, images)
        cohort.exchange.gather_objects = heard
        # Peers that take the others to be like themselves may fail, once they have told all that there is to tell.
        with contextlib.suppress(RuntimeError, ValueError, IndexError):
            parts = _batches(cohort)
            train_step(cohort, parts, Progress(0, 1, config.train.epochs_of(1)), Clock(META))
    return told


def _step(cohort: Cohort, config: RunConfig, placement: Placement, steps: Sequence[int]) -> Rehearsal:
    steps_per_epoch = max(1, *steps) + 1
    call = ToldAgain()
    for step in steps:
        watch = _Watch(call)
        clock = _Phases(watch)
        parts = _batches(cohort)
        for optimizer in cohort.optimizers():
            optimizer.zero_grad(set_to_none=True)  # or the gradients of the step before would count as there already
        with _named_lines(), watch, _Handed(watch):
            train_step(cohort, parts, Progress(step, steps_per_epoch, config.train.epochs_of(steps_per_epoch)), clock)
    gradients = [p.grad for module in _modules(cohort) for p in module.parameters() if p.grad is not None]
    averages = [r.ema for r in cohort.residents.values() if r.ema is not None]
    standing = {
        "weights": _bytes([*_modules(cohort)]),
        "optimizer": _size(x for o in cohort.optimizers() for x in tree_leaves(list(o.state.values()))),
        "averages": _bytes(averages),
        "tables": _size(t.rows for t in cohort.method.modules() if isinstance(t, WholeTable | ShardedTable)),
    }
    standing["weights"] -= standing["tables"]
    memory = Memory(
        **standing,
        gradients=_size(gradients),
        activations=watch.peak(set(_PHASES) - {"exchange"}, but=gradients),
        exchange=watch.peak({"exchange"}),
        total=sum(standing.values()) + watch.peak(_PHASES),
    )
    _check_optimizers(cohort)
    return Rehearsal(memory, watch.operations, tuple(dict.fromkeys([*watch.waits, *_known_waits(cohort)])))


def _known_waits(cohort: Cohort) -> Iterator[str]:
    """Where the host waits and a rehearsal takes another way."""
    learners = [cohort.config.cohort[k][1] for k in cohort.residents if cohort.config.cohort[k][1].learns]
    optimizers = [cohort.config.optimizer_of(peer).name for peer in learners]
    for name in dict.fromkeys(optimizers):
        if not fusible(name):
            yield f"optimizer.name = {name}: is not fused, so each update waits for its flag"
    if any(isinstance(module, ShardedTable) for module in cohort.method.modules()):
        yield "method.bank_sharded = True: each reading of a bank waits for the number of rows that each rank wants"
    if cohort.config.train.sync_bn and cohort.placement.replicas > 1:
        yield "train.sync_bn = True: each layer waits for the number of rows of each rank"


def _modules(cohort: Cohort) -> list[nn.Module]:
    return [*(r.peer for r in cohort.residents.values()), cohort.shared]


def _check_optimizers(cohort: Cohort) -> None:
    for optimizer in cohort.optimizers():
        for parameter, state in optimizer.state.items():
            for name, x in state.items():
                if isinstance(x, Tensor) and x.ndim and x.device != parameter.device:
                    raise RehearsalError(f"an optimiser's {name} lies on {x.device}, its parameter on {META}")


def _bytes(modules: Sequence[nn.Module]) -> int:
    return _size(x for module in modules for x in (*module.parameters(), *module.buffers()))


def _size(tensors: Any) -> int:
    """Bytes of the storages of tensors, each counted once."""
    storages = {x.untyped_storage()._cdata: x.untyped_storage().nbytes() for x in tensors if isinstance(x, Tensor)}
    return sum(storages.values())


# -- what is watched --------------------------------------------------------------------------------------------------


class _Watch(TorchDispatchMode):
    """Sees every operation: what it allocates, and whether it brings two devices together."""

    def __init__(self, call: ToldAgain) -> None:
        super().__init__()
        self._call = call
        self.operations = 0
        self.waits: list[str] = []
        self.phase = "forward"
        self._live: dict[int, int] = {}
        """Number of each allocation that has not been freed, by its address, which others may have later."""
        self._sizes: list[int] = []
        self._phases: list[str] = []
        self._events: list[tuple[int, int]] = []

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        """Nothing here is compiled, and torch need not import its compiler to hear so."""
        return False

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.operations += 1
        result = self._call(function, args, kwargs or {})
        made, given = tensors(result), tensors((args, kwargs))
        of_host = [x for x in given if not x.is_meta]
        if of_host and any(x.is_meta for x in (*made, *given)):
            if _copies(function):
                self.waits.append(f"{_line()}: {function} between the host and the device")
            elif any(x.ndim for x in of_host):  # a single number of the host's may meet any tensor
                raise RehearsalError(f"{_line()}: {function} of tensors on the host and on the device")
        for x in made:
            if x.is_meta:
                self._allocated(x)
        return result

    def _allocated(self, x: Tensor) -> None:
        storage = x.untyped_storage()
        if storage._cdata in self._live:
            return
        number = len(self._sizes)
        self._live[storage._cdata] = number
        self._sizes.append(storage.nbytes())
        self._phases.append(self.phase)
        self._events.append((number, 1))
        weakref.finalize(storage, self._freed, storage._cdata, number)

    def _freed(self, address: int, number: int) -> None:
        self._events.append((number, -1))
        if self._live.get(address) == number:
            del self._live[address]

    def peak(self, phases: Collection[str], but: Sequence[Tensor] = ()) -> int:
        """The most bytes that were allocated at once, of what was made in some phases, but for some tensors."""
        left_out = {self._live.get(x.untyped_storage()._cdata) for x in but}
        now, most = 0, 0
        for number, sign in self._events:
            if self._phases[number] in phases and number not in left_out:
                now += sign * self._sizes[number]
                most = max(most, now)
        return most


class _Handed(TorchFunctionMode):
    """Sees numbers of the host that are made into tensors of the device, which make the host wait on a GPU."""

    def __init__(self, watch: _Watch) -> None:
        super().__init__()
        self._watch = watch

    def __torch_function__(
        self, function: Callable[..., Any], types: Sequence[type], args: Sequence[Any] = (), kwargs: Any = None
    ) -> Any:
        result = function(*args, **(kwargs or {}))
        if function in (torch.tensor, torch.as_tensor, torch.asarray) and result.is_meta:
            given = args[0] if args else None
            if not (isinstance(given, Tensor) and given.is_meta):
                self._watch.waits.append(f"{_line()}: numbers of the host become a tensor of the device")
        return result


def _copies(function: Any) -> bool:
    return str(function).startswith(("aten._to_copy", "aten.copy_", "aten._foreach_copy_", "aten.index"))


_PHASES = ("forward", "exchange", "backward", "optimizer")


class _Phases(Clock):
    """Tells a watch which part of the step is next."""

    def __init__(self, watch: _Watch) -> None:
        self._watch = watch
        super().__init__(META)

    def mark(self, name: str) -> None:
        super().mark(name)
        self._watch.phase = _PHASES[(_PHASES.index(name) + 1) % len(_PHASES)] if name in _PHASES else _PHASES[0]


@contextlib.contextmanager
def _named_lines() -> Iterator[None]:
    """What torch raises without numbers or across devices is told with the line of this project that asked for it."""
    try:
        yield
    except (RuntimeError, NotImplementedError) as error:
        text = str(error)
        if not any(word in text for word in ("meta", "Meta", "device")):
            raise
        raise RehearsalError(f"{_line(error)}: {text.partition(chr(10))[0]}") from error


def _line(error: BaseException | None = None) -> str:
    frames = traceback.extract_tb(error.__traceback__) if error else traceback.extract_stack()
    ours = [f for f in frames if f.filename.startswith(_ROOT) and f.filename not in _WATCHING]
    ours = [f for f in ours if ".venv" not in f.filename] or list(frames)
    frame = ours[-1]
    return f"{Path(frame.filename).name}:{frame.lineno} ({frame.line})"


def readable(size: int) -> str:
    """A number of bytes for a person: 1536 -> 1.5 KiB."""
    power = min(int(math.log(max(size, 1), 1024)), 4)
    return f"{size / 1024**power:.1f} {('B', 'KiB', 'MiB', 'GiB', 'TiB')[power]}" if power else f"{size} B"

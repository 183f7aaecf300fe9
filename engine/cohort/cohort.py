"""The part of a cohort that lives on this rank: peers with their heads, optimisers and averages, and the method."""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal, TypeVar

import torch
import torch.distributed as dist
from timm.scheduler.scheduler import Scheduler
from timm.utils import ModelEmaV3
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.parallel import DistributedDataParallel

import models
from data_pipelines import Batch, Pipeline
from engine.cohort.gradients import scale_gradient
from engine.cohort.optim import make_optimizer, make_schedule, set_weight_decay
from engine.cohort.outline import Outline, outline
from engine.cohort.randomness import before_forward, initialisation
from engine.cohort.teacher import Teacher
from engine.config import ConfigError, RunConfig
from engine.ranks.exchange import Exchange
from engine.ranks.meeting import Meeting
from engine.ranks.placement import Placement
from engine.ranks.tables import make_table
from losses import METHODS, OuterStep, Progress, Signals, Terms
from models.stages import Joined, Taps, cut

_M = TypeVar("_M", bound=nn.Module)
_AUTOCAST = {"float32": None, "bf16": torch.bfloat16, "fp16": torch.float16}


class Peer(nn.Module):
    """A network, or its branch, and the head that the method attached to it."""

    def __init__(self, network: nn.Module, head: nn.Module | None, taps: Taps | None, signals: Sequence[str]) -> None:
        super().__init__()
        self.network = network
        self.head = head
        self._taps = taps
        self._signals = dict.fromkeys(("logits", *signals))

    def forward(self, images: Tensor, below: Mapping[str, Tensor] | None = None) -> dict[str, Tensor]:
        """Gives the peer's signals.

        Args:
            images: [N, channels, H, W]; for a branch the trunk's map.
            below: feature maps that the trunk has shown.

        Returns:
            `logits` [N, C], and what else the method asked for.
        """
        available = {**(below or {}), "logits": self.network(images)}
        if self._taps is not None:
            available |= self._taps.take()
        if self.head is not None:
            available |= self.head(available)
        return {name: available[name] for name in self._signals}


@dataclass
class Resident:
    """One peer on this rank."""

    index: int
    name: str
    peer: Peer
    whole: nn.Module
    """The peer's network, with the trunk where that is shared: what is evaluated and exported."""
    wrapped: nn.Module
    """The peer as it is called in training: it averages gradients over its replica group, if that has several ranks."""
    optimizer: torch.optim.Optimizer
    apart: frozenset[str]
    """Names of those parameters of the peer that its replicas do not have in common."""
    outer: dict[str, nn.Parameter]
    """Those parameters of the peer that an outer step moves, by name, and"""
    outer_optimizer: torch.optim.Optimizer | None
    ema: ModelEmaV3 | Teacher | None
    """The peer's moving average; a method's teacher, where it has one."""


class Cohort:
    """Everything of this rank that learns."""

    def __init__(
        self,
        config: RunConfig,
        placement: Placement,
        device: torch.device,
        *,
        num_classes: int,
        channels: int,
        image_size: int,
        steps_per_epoch: int,
    ) -> None:
        self.config, self.placement, self.device = config, placement, device
        self.num_classes, self.channels, self.image_size = num_classes, channels, image_size
        self._steps_per_epoch = steps_per_epoch
        mesh = placement.mesh(device.type)
        self.replica_group: dist.ProcessGroup = mesh.get_group("replica")
        wire = torch.bfloat16 if config.placement.exchange_dtype == "bf16" else torch.float32
        self.exchange = Exchange(placement, mesh.get_group("peer"), wire)
        self.scaler = torch.amp.GradScaler(device.type, enabled=config.precision.amp == "fp16")
        self.autocast = _AUTOCAST[config.precision.amp]
        self._schedules: list[Scheduler] = []

        method = METHODS[config.method.name]
        self.turns = method.turns(config.method, placement.num_peers)
        outlines = [self._outline(index) for index in range(placement.num_peers)]
        with initialisation(config.seed, placement.num_peers):
            self.method = self._placed(method(config.method, [outline.info for outline in outlines]))
        self.meeting = None
        if placement.only is not None:
            self.meeting = Meeting(config, placement, self.method.shown_apart(), device)
        self.trunk = self._shared_trunk(outlines[0])
        self._trunk_maps: dict[int, Tensor] = {}
        self.shared = nn.ModuleDict({"method": self.method} | ({"trunk": self.trunk} if self.trunk else {}))
        self.wrapped_method = self._averaged_over_all(self.method)
        self.wrapped_trunk = self.trunk and self._averaged_over_all(self.trunk)
        learns = any(p.requires_grad for p in self.shared.parameters())
        self.shared_optimizer = self._optimizer(self.shared, method.weight_decay(config.method)) if learns else None
        whole_at_once = len(self.turns) == 1 and self.method.exchange != "differentiable"
        if not whole_at_once and any(p.requires_grad for p in self.method.parameters()):
            # Their gradient is whole on every rank only if every rank computes the whole objective of its rows at once.
            raise ValueError(f"{method.name}: modules that all peers share need one turn and signals without gradient")

        self.residents = {index: self._resident(index, outlines[index]) for index in placement.residents}
        peers = [r.peer for r in self.residents.values()]
        averages = [r.ema for r in self.residents.values() if r.ema is not None]
        self._averaged_buffers = _floats([*peers, *averages])
        self._trunk_buffers = _floats([self.trunk]) if self.trunk else []
        # Of a method's other buffers only the method knows what they mean; in evaluation mode statistics stay fixed.
        statistics = [module for module in self.method.modules() if isinstance(module, _BatchNorm) and module.training]
        self._shared_buffers = [*self._trunk_buffers, *_floats(statistics)]
        self._trunk_counters = [b for b in self.trunk.buffers() if not b.is_floating_point()] if self.trunk else []
        teachers = [average for average in averages if isinstance(average, Teacher)]
        every = [b for module in (*peers, *teachers, self.shared) for b in module.buffers()]
        self._remembered = [[b for b in every if b.dtype == dtype] for dtype in {b.dtype: None for b in every}]
        self._before = [_flat(buffers) for buffers in self._remembered]
        self.nothing = torch.zeros((), device=device)
        self.stop = torch.zeros(1, device=device)
        """The number of a signal that this rank got, 0 without; after an update the largest of any rank."""

    @classmethod
    def on(cls, pipeline: Pipeline, config: RunConfig, placement: Placement, device: torch.device) -> Cohort:
        """The cohort for the images of a pipeline. Raises: ConfigError, where they are not fit for the method."""
        cohort = cls(
            config,
            placement,
            device,
            num_classes=pipeline.num_classes,
            channels=pipeline.channels,
            image_size=pipeline.image_size,
            steps_per_epoch=pipeline.steps_per_epoch,
        )
        cohort.prepare(torch.from_numpy(pipeline.train_targets))
        return cohort

    def prepare(self, classes: Tensor) -> None:
        """Tells the method of the training images' classes, int64 [n], see `Method.prepare`. Raises: ConfigError."""
        try:
            self.method.prepare(classes.to(self.device), partial(make_table, self.device))
        except ValueError as error:
            raise ConfigError(f"method.name = {self.method.name}: {error}") from None

    def _outline(self, index: int) -> Outline:
        copy = partial(self._copy, index)
        return outline(self.config, index, self.num_classes, self.channels, self.image_size, copy)

    def _network(self, index: int, pretrained: bool | str = False) -> nn.Module:
        peer = self.config.cohort[index][1]
        with initialisation(self.config.seed, index):
            network = models.create(
                peer.network, self.num_classes, self.channels, pretrained=pretrained, **peer.options
            )
        network = self._placed(network)
        if self.config.train.sync_bn:
            network = nn.SyncBatchNorm.convert_sync_batchnorm(network, self.replica_group)
        return network

    def _copy(self, index: int) -> nn.Module:
        network = self._network(index)
        if self.config.precision.compile:
            network.compile()
        return network

    def _placed(self, module: _M) -> _M:
        memory_format = torch.channels_last if self.config.precision.channels_last else torch.contiguous_format
        return module.to(self.device, memory_format=memory_format)  # type: ignore[call-overload]

    def _shared_trunk(self, outline: Outline) -> nn.Module | None:
        if outline.trunk is None:
            return None
        trunk, _ = cut(self._network(0, self.config.cohort[0][1].pretrained), outline.trunk)
        below = {name: path for name, path in outline.taps.items() if _has(trunk, path)}
        self._trunk_taps = Taps(trunk, below, {})
        if self.config.precision.compile:
            trunk.compile()
        return trunk

    def _resident(self, index: int, outline: Outline) -> Resident:
        with initialisation(self.config.seed, self.placement.num_peers + 1 + index):
            head = self.method.head(outline.info)
        if head is not None and self.placement.replica and self.method.kept_apart(head):
            with initialisation(self.config.seed, (2 + self.placement.replica) * self.placement.num_peers + 1 + index):
                other = self.method.head(outline.info)
            assert other is not None
            for p, own in zip(self.method.kept_apart(head), self.method.kept_apart(other), strict=True):
                p.data.copy_(own)
        network = self._network(index, self.config.cohort[index][1].pretrained)
        whole = network
        if self.trunk is not None and outline.trunk is not None:
            _, network = cut(network, outline.trunk)
            whole = Joined(self.trunk, network)
        ema: ModelEmaV3 | Teacher | None = None
        if self.method.teacher_decay(self.config.method, 0) is not None:
            ema = Teacher(whole, compiled=self.config.precision.compile)
        elif self.config.train.ema_decay:
            ema = ModelEmaV3(whole, decay=self.config.train.ema_decay)
        above = {name: path for name, path in outline.taps.items() if _has(network, path)}
        taps = Taps(network, above, outline.inputs) if outline.inputs else None
        if self.config.precision.compile:
            network.compile()
        signals = [name for name in self.method.signals if name != "teacher"]
        outer = list(self.method.outer(head)) if head is not None else []
        apart = list(self.method.kept_apart(head)) if head is not None else []
        outer_optimizer = self._optimizer(nn.ParameterList(outer)) if outer else None
        for p in outer:
            p.requires_grad_(False)
        peer = Peer(network, head and self._placed(head), taps, signals)
        names = {id(p): name for name, p in peer.named_parameters()}
        return Resident(
            index=index,
            name=self.config.cohort[index][0],
            peer=peer,
            whole=whole,
            wrapped=_average_gradients(peer, self.replica_group, self.device, [names[id(p)] for p in apart]),
            apart=frozenset(names[id(p)] for p in apart),
            optimizer=self._optimizer(peer),
            outer={names[id(p)]: p for p in outer},
            outer_optimizer=outer_optimizer,
            ema=ema,
        )

    def _optimizer(self, module: nn.Module, decay_of_method: float | None = None) -> torch.optim.Optimizer:
        optimizer = make_optimizer(module, self.config.optimizer)
        if decay_of_method is not None:
            set_weight_decay(optimizer, self.method.parameters(), decay_of_method)
        schedule = make_schedule(optimizer, self.config.schedule, self.config.train.epochs, self._steps_per_epoch)
        self._schedules.append(schedule)
        return optimizer

    def _averaged_over_all(self, module: nn.Module) -> nn.Module:
        learns = any(p.requires_grad for p in module.parameters())
        return _average_gradients(module, dist.group.WORLD, self.device) if learns else module

    @property
    def averages_gradients(self) -> bool:
        """Whether any gradient of this cohort is averaged over ranks, here or elsewhere."""
        return self.placement.replicas > 1 or (self.placement.world > 1 and self.shared_optimizer is not None)

    @property
    def views(self) -> Sequence[int]:
        """The augmentations of an image that this rank's peers see."""
        return self.placement.residents if self.config.data.views == "per_peer" else (0,)

    def forward(self, batch: Batch, progress: Progress, micro: int, peers: Sequence[int]) -> Mapping[int, Signals]:
        """The live signals of those of `peers` that live here, for this rank's rows, each on the view that it sees."""
        step = progress.step
        views = dict(zip(self.placement.residents, itertools.cycle(batch.views), strict=False))
        here = [index for index in peers if index in self.residents]
        signals: dict[int, Signals] = {}
        with torch.autocast(self.device.type, dtype=self.autocast, enabled=self.autocast is not None):
            below = self._run_trunk({k: views[k] for k in here}, step, micro)
            for index in here:
                before_forward(self.config.seed, index, step, micro, self.placement.replica, self.device)
                images, maps = below.get(index, (views[index], None))
                signals[index] = self.residents[index].wrapped(images, maps)
                teacher = self.residents[index].ema
                if isinstance(teacher, Teacher):
                    stream = 2 * self.placement.num_peers + 1 + index
                    before_forward(self.config.seed, stream, step, micro, self.placement.replica, self.device)
                    signals[index] = {**signals[index], "teacher": teacher(views[index])}
            with torch.no_grad():
                seen = self.method.look({k: views[k] for k in here}, progress)
        return {k: {**own, **seen.get(k, {})} for k, own in signals.items()}

    def _run_trunk(
        self, views: Mapping[int, Tensor], step: int, micro: int
    ) -> dict[int, tuple[Tensor, dict[str, Tensor]]]:
        """The trunk's map and tapped maps for each peer: one forward pass for each view.

        BatchNorm statistics follow the mean of the views, as they do where each view is seen on another rank.
        """
        if self.trunk is None or self.wrapped_trunk is None:
            return {}
        # Averaged over the world, the gradients of the groups' peers would count as one group's.
        factor = self.placement.groups / (self.placement.num_peers if self.method.trunk_gradient == "mean" else 1)
        before, after = _flat(self._trunk_buffers), []
        runs: dict[int, tuple[Tensor, dict[str, Tensor]]] = {}
        for index, images in views.items():
            if id(images) in runs:
                continue
            _fill(self._trunk_buffers, before)
            stream = self.placement.num_peers + 1 + (index if self.config.data.views == "per_peer" else 0)
            before_forward(self.config.seed, stream, step, micro, self.placement.replica, self.device)
            runs[id(images)] = self.wrapped_trunk(images), self._trunk_taps.take()
            after.append(_flat(self._trunk_buffers))
        _fill(self._trunk_buffers, torch.stack(after).mean(0))
        for counter in self._trunk_counters:
            counter -= len(runs) - 1  # one step, however many views
        self._trunk_maps = {k: runs[id(images)][0] for k, images in views.items()}
        return {
            k: (
                scale_gradient(runs[id(images)][0], factor),
                {name: scale_gradient(x, factor) for name, x in runs[id(images)][1].items()},
            )
            for k, images in views.items()
        }

    def objective(
        self, learners: Sequence[int], signals: Sequence[Signals], targets: Tensor, progress: Progress, micro: int
    ) -> Terms:
        """The method's terms for the learners that live here; none where no learner does."""
        if not learners:
            return {}
        shared = self.placement.num_peers
        before_forward(self.config.seed, shared, progress.step, micro, self.placement.replica, self.device)
        seen = [
            {**peer, "trunk": self._trunk_maps[k].float()} if k in self._trunk_maps else peer
            for k, peer in enumerate(signals)
        ]
        return self.wrapped_method(learners, seen, targets, progress)

    def share(self, own: Mapping[int, Signals], batch: Batch) -> Sequence[Signals]:
        """The one exchange of a step: live signals of the residents -> those of all K peers."""
        return self._exchanged(own, batch, self.method.exchange)

    def _exchanged(
        self, own: Mapping[int, Signals], batch: Batch, mode: Literal["none", "detached", "differentiable"]
    ) -> Sequence[Signals]:
        method = self.method
        rows = (batch.targets, batch.ids) if method.everywhere else None
        return self.exchange(own, mode, private=method.private, everywhere=method.everywhere, rows=rows)

    def outer_gradients(self, batch: Batch, progress: Progress) -> bool:
        """Gives the residents' outer parameters the gradients that the method has for them, the mean over all replicas.

        Returns:
            Whether an outer step was due.
        """
        groups = {k: r.optimizer.param_groups for k, r in self.residents.items()}
        decay = {
            k: {id(p): group["weight_decay"] for group in own for p in group["params"]} for k, own in groups.items()
        }
        named = {k: dict(r.peer.named_parameters()) for k, r in self.residents.items()}
        # torch.compile has no second derivative; float16 would need a scale of its own.
        with torch.compiler.set_stance("force_eager"):
            found = self.method.outer_step(
                OuterStep(
                    parameters=named,
                    outer={k: list(r.outer) for k, r in self.residents.items()},
                    show=partial(self._shown_by, batch=batch, progress=progress),
                    average=self._mean_over_replicas,
                    lr=next(iter(groups.values()))[0]["lr"],
                    momentum=self.config.optimizer.momentum,
                    weight_decay={
                        k: {name: decay[k].get(id(p), 0.0) for name, p in own.items()} for k, own in named.items()
                    },
                    targets=batch.targets,
                    progress=progress,
                )
            )
        if found is None:
            return False
        for k, gradients in self._mean_over_replicas(found).items():
            for p, gradient in zip(self.residents[k].outer.values(), gradients, strict=True):
                p.grad = gradient
        return True

    def _shown_by(
        self, parameters: Mapping[int, Mapping[str, Tensor]], batch: Batch, progress: Progress
    ) -> Sequence[Signals]:
        """The signals of all K peers as a function of the residents' parameters, see `OuterStep.show`."""
        own: dict[int, Signals] = {}
        views = dict(zip(self.placement.residents, itertools.cycle(batch.views), strict=False))
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.autocast is torch.bfloat16):
            for k, resident in self.residents.items():
                before_forward(self.config.seed, k, progress.step, 0, self.placement.replica, self.device)
                buffers = {name: b.clone() for name, b in resident.peer.named_buffers()}
                own[k] = functional_call(resident.peer, {**parameters[k], **buffers}, (views[k],))
        return self._exchanged(own, batch, "differentiable")

    def _mean_over_replicas(self, tensors: Mapping[int, Sequence[Tensor]]) -> dict[int, list[Tensor]]:
        if self.replica_group.size() == 1:
            return {k: list(own) for k, own in tensors.items()}
        every = [x for own in tensors.values() for x in own]
        flat = _flat(every)
        dist.all_reduce(flat, group=self.replica_group)
        pieces = iter((flat / self.replica_group.size()).split([x.numel() for x in every]))
        return {k: [next(pieces).view_as(x) for x in own] for k, own in tensors.items()}

    @contextlib.contextmanager
    def gradients_stay_here(self, stay: bool) -> Iterator[None]:
        """Gradients of all but the last micro-batch are added up on the rank before they are averaged once."""
        with contextlib.ExitStack() as stack:
            for module in (*(r.wrapped for r in self.residents.values()), self.wrapped_method, self.wrapped_trunk):
                if stay and isinstance(module, DistributedDataParallel):
                    stack.enter_context(module.no_sync())
            yield

    def begin_step(self, step: int) -> None:
        """Sets the learning rates of update number `step`, drops old gradients, remembers buffers in case of a skip."""
        for schedule in self._schedules:
            schedule.step_update(step)
        for optimizer in self.optimizers():
            optimizer.zero_grad(set_to_none=True)
        self._before = [_flat(buffers) for buffers in self._remembered]

    def restore_buffers(self, skip: Tensor) -> None:
        """Statistics of the peers and of the method would keep the non-finite values of a skipped step for ever."""
        for buffers, before in zip(self._remembered, self._before, strict=True):
            _fill(buffers, torch.where(skip > 0, before, _flat(buffers)))

    def exchange_after(self, step: int) -> Callable[..., Sequence[Signals]]:
        """What a method exchanges by after update number `step`."""
        if self.meeting is not None:
            return partial(self.meeting, step=step + 1)
        return partial(self.exchange, wire=torch.float32)

    def update_averages(self, step: int) -> None:
        """Moves the residents' averages and teachers, after update number `step`."""
        for resident in self.residents.values():
            if isinstance(resident.ema, Teacher):
                resident.ema.update(resident.whole, self.method.teacher_decay(self.config.method, step) or 0.0)
            elif resident.ema is not None:
                resident.ema.update(resident.whole)

    def optimizers(self) -> list[torch.optim.Optimizer]:
        """Of each resident, then of the method's shared modules, then of outer steps."""
        shared = [self.shared_optimizer] if self.shared_optimizer else []
        return [*(r.optimizer for r in self.residents.values()), *shared, *self.outer_optimizers()]

    def outer_optimizers(self) -> list[torch.optim.Optimizer]:
        """Of what outer steps move, of each resident that has some."""
        return [r.outer_optimizer for r in self.residents.values() if r.outer_optimizer is not None]

    def networks(self, ema: bool = False) -> dict[int, nn.Module]:
        """The residents' plain networks, or their moving averages."""
        if ema:
            return {k: r.ema.module for k, r in self.residents.items() if r.ema is not None}
        return {k: r.whole for k, r in self.residents.items()}

    def average_buffers(self) -> None:
        """BatchNorm statistics over all rows: one all-reduce of their mean in each replica group.

        Each rank's statistics are linear in its batches, so averaging now and going on is the same as averaging later.
        """
        for buffers, group in ((self._averaged_buffers, self.replica_group), (self._shared_buffers, dist.group.WORLD)):
            if buffers and group is not None and group.size() > 1:
                flat = _flat(buffers)
                dist.all_reduce(flat, group=group)
                _fill(buffers, flat / group.size())


def _has(network: nn.Module, path: str) -> bool:
    """Whether a part of a cut network has the submodule itself, not what was put in its place."""
    try:
        return not isinstance(network.get_submodule(path), nn.Identity)
    except AttributeError:
        return False


def _floats(modules: Sequence[nn.Module]) -> list[Tensor]:
    # .data: autograd has BatchNorm's statistics among what it keeps, and would take a later write for a mistake.
    return [b.data for module in modules for b in module.buffers() if b.is_floating_point()]


def _flat(tensors: Sequence[Tensor]) -> Tensor:
    # Hundreds of small tensors in one piece: a few kernels instead of one for each.
    return torch.cat([x.reshape(-1) for x in tensors]) if tensors else torch.empty(0)


def _fill(tensors: Sequence[Tensor], flat: Tensor) -> None:
    if not tensors:
        return
    pieces = flat.split([x.numel() for x in tensors])
    torch._foreach_copy_(list(tensors), [piece.view_as(x) for piece, x in zip(pieces, tensors, strict=True)])


def _average_gradients(
    module: nn.Module, group: dist.ProcessGroup | None, device: torch.device, apart: Sequence[str] = ()
) -> nn.Module:
    assert group is not None
    if group.size() == 1:
        return module
    # Of DDP's own making, and the only way to have it leave parameters alone.
    DistributedDataParallel._set_params_and_buffers_to_ignore_for_model(module, apart)
    return DistributedDataParallel(
        module,
        device_ids=[device.index] if device.type == "cuda" else None,
        process_group=group,
        gradient_as_bucket_view=True,
        **_KEEP_BUFFERS,
    )


# Each rank keeps its own BatchNorm statistics; average_buffers brings them together when somebody looks. The argument's
# name changed with torch 2.13.
_NEW_NAME = "forward_sync_buffers" in DistributedDataParallel.__init__.__annotations__
_KEEP_BUFFERS: Any = {"forward_sync_buffers" if _NEW_NAME else "broadcast_buffers": False}

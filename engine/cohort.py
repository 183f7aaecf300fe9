"""The part of a cohort that lives on this rank: peers with their heads, optimisers and averages, and the method."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from timm.scheduler.scheduler import Scheduler
from timm.utils import ModelEmaV3
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

import models
from engine.config import RunConfig
from engine.exchange import Exchange
from engine.optim import make_optimizer, make_schedule
from engine.placement import Placement
from engine.randomness import before_forward, initialisation
from losses import METHODS, Method, PeerInfo, Progress, Signals, Terms
from models.weightless import weightless

_AUTOCAST = {"float32": None, "bf16": torch.bfloat16, "fp16": torch.float16}


class Peer(nn.Module):
    """A network and the head that the method attached to it. Only the network is evaluated and exported."""

    def __init__(self, network: nn.Module, head: nn.Module | None, signals: Sequence[str]) -> None:
        super().__init__()
        self.network = network
        self.head = head
        self._signals = dict.fromkeys(("logits", *signals))
        self._features: Tensor | None = None
        if head is not None or "features" in signals:
            classifier, _ = models.pooled_features(network)
            network.get_submodule(classifier).register_forward_pre_hook(self._keep_features)

    def _keep_features(self, _: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        self._features = inputs[0]

    def forward(self, images: Tensor) -> dict[str, Tensor]:
        """images [N, channels, H, W] -> the peer's signals, `logits` [N, C] among them."""
        available = {"logits": self.network(images)}
        if self._features is not None:
            available["features"], self._features = self._features, None
        if self.head is not None:
            available |= self.head(available)
        return {name: available[name] for name in self._signals}


@dataclass
class Resident:
    """One peer on this rank."""

    index: int
    name: str
    peer: Peer
    wrapped: nn.Module
    """The peer as it is called in training: it averages gradients over its replica group, if that has several ranks."""
    optimizer: torch.optim.Optimizer
    schedule: Scheduler
    ema: ModelEmaV3 | None


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
        steps_per_epoch: int,
    ) -> None:
        self.config, self.placement, self.device = config, placement, device
        self.num_classes, self.channels = num_classes, channels
        mesh = placement.mesh(device.type)
        self.replica_group: dist.ProcessGroup = mesh.get_group("replica")
        wire = torch.bfloat16 if config.placement.exchange_dtype == "bf16" else torch.float32
        self.exchange = Exchange(placement, mesh.get_group("peer"), wire)
        self.scaler = torch.amp.GradScaler(device.type, enabled=config.precision.amp == "fp16")
        self.autocast = _AUTOCAST[config.precision.amp]

        method = METHODS[config.method.name]
        self.turns = method.turns(config.method, placement.num_peers)
        networks: dict[int, nn.Module] = {}
        infos: list[PeerInfo] = []
        wants_features = "features" in method.signals or method.head is not Method.head
        for index, (_, peer) in enumerate(config.cohort):
            if index in placement.residents:
                with initialisation(config.seed, index):
                    networks[index] = models.create(peer.network, num_classes, channels, **peer.options)
            features = 0
            if wants_features:
                with weightless(peer.network):
                    outline = models.create(peer.network, num_classes, channels, **peer.options)
                _, features = models.pooled_features(outline)
            infos.append(PeerInfo(index, num_classes, features))
        with initialisation(config.seed, placement.num_peers):
            self.method = method(config.method, infos).to(device)

        learns = any(p.requires_grad for p in self.method.parameters())
        if learns and (len(self.turns) > 1 or method.exchange == "differentiable"):
            # Their gradient is whole on every rank only if every rank computes the whole objective of its rows at once.
            raise ValueError(f"{method.name}: modules that all peers share need one turn and signals without gradient")
        self.shared_optimizer = make_optimizer(self.method, config.optimizer) if learns else None
        self._schedules: list[Scheduler] = []
        if self.shared_optimizer:
            self._schedules.append(self._schedule(self.shared_optimizer, steps_per_epoch))
        self.wrapped_method = _average_gradients(self.method, dist.group.WORLD, device) if learns else self.method
        self.residents = {
            index: self._resident(index, network, infos[index], steps_per_epoch) for index, network in networks.items()
        }
        modules = [m for r in self.residents.values() for m in (r.peer, r.ema) if m is not None]
        self._buffers = [b for module in modules for b in module.buffers() if b.is_floating_point()]
        self.nothing = torch.zeros((), device=device)
        every = [b for module in (*(r.peer for r in self.residents.values()), self.method) for b in module.buffers()]
        formats = {b.dtype: None for b in every}
        self._remembered = [[b for b in every if b.dtype == dtype] for dtype in formats]
        self._before = [_flat(buffers) for buffers in self._remembered]

    def _resident(self, index: int, network: nn.Module, info: PeerInfo, steps_per_epoch: int) -> Resident:
        config = self.config
        with initialisation(config.seed, self.placement.num_peers + 1 + index):
            head = self.method.head(info)
        memory_format = torch.channels_last if config.precision.channels_last else torch.contiguous_format
        network = network.to(self.device, memory_format=memory_format)  # type: ignore[call-overload]
        if config.train.sync_bn:
            network = nn.SyncBatchNorm.convert_sync_batchnorm(network, self.replica_group)
        ema = ModelEmaV3(network, decay=config.train.ema_decay) if config.train.ema_decay else None
        if config.precision.compile:
            network.compile()
        peer = Peer(network, head and head.to(self.device), self.method.signals)
        optimizer = make_optimizer(peer, config.optimizer)
        schedule = self._schedule(optimizer, steps_per_epoch)
        return Resident(
            index=index,
            name=config.cohort[index][0],
            peer=peer,
            wrapped=_average_gradients(peer, self.replica_group, self.device),
            optimizer=optimizer,
            schedule=schedule,
            ema=ema,
        )

    def _schedule(self, optimizer: torch.optim.Optimizer, steps_per_epoch: int) -> Scheduler:
        schedule = make_schedule(optimizer, self.config.schedule, self.config.train.epochs, steps_per_epoch)
        self._schedules.append(schedule)
        return schedule

    def forward(self, images: Tensor, step: int, micro: int, peers: Sequence[int]) -> Mapping[int, Signals]:
        """The live signals of those of `peers` that live here, for this rank's rows. images [N, channels, H, W]."""
        signals: dict[int, Signals] = {}
        for index in peers:
            if index not in self.residents:
                continue
            before_forward(self.config.seed, index, step, micro, self.placement.replica, self.device)
            with torch.autocast(self.device.type, dtype=self.autocast, enabled=self.autocast is not None):
                signals[index] = self.residents[index].wrapped(images)
        return signals

    def objective(
        self, learners: Sequence[int], signals: Sequence[Signals], targets: Tensor, progress: Progress, micro: int
    ) -> Terms:
        """The method's terms for the learners that live here; none where no learner does."""
        if not learners:
            return {}
        shared = self.placement.num_peers
        before_forward(self.config.seed, shared, progress.step, micro, self.placement.replica, self.device)
        return self.wrapped_method(learners, signals, targets, progress)

    @contextlib.contextmanager
    def gradients_stay_here(self, stay: bool) -> Iterator[None]:
        """Gradients of all but the last micro-batch are added up on the rank before they are averaged once."""
        with contextlib.ExitStack() as stack:
            for module in (*(r.wrapped for r in self.residents.values()), self.wrapped_method):
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

    def optimizers(self) -> list[torch.optim.Optimizer]:
        """Of each resident, then of the method's shared modules."""
        shared = [self.shared_optimizer] if self.shared_optimizer else []
        return [*(r.optimizer for r in self.residents.values()), *shared]

    def networks(self, ema: bool = False) -> dict[int, nn.Module]:
        """The residents' plain networks, or their moving averages."""
        if ema:
            return {k: r.ema.module for k, r in self.residents.items() if r.ema is not None}
        return {k: r.peer.network for k, r in self.residents.items()}

    def average_buffers(self) -> None:
        """BatchNorm statistics over all rows: one all-reduce of their mean in each replica group.

        Each rank's statistics are linear in its batches, so averaging now and going on is the same as averaging later.
        """
        if self.replica_group.size() == 1 or not self._buffers:
            return
        flat = _flat(self._buffers)
        dist.all_reduce(flat, group=self.replica_group)
        _fill(self._buffers, flat / self.replica_group.size())


def _flat(tensors: Sequence[Tensor]) -> Tensor:
    # Hundreds of small tensors in one piece: a few kernels instead of one for each.
    return torch.cat([x.reshape(-1) for x in tensors])


def _fill(tensors: Sequence[Tensor], flat: Tensor) -> None:
    pieces = flat.split([x.numel() for x in tensors])
    torch._foreach_copy_(list(tensors), [piece.view_as(x) for piece, x in zip(pieces, tensors, strict=True)])


def _average_gradients(module: nn.Module, group: dist.ProcessGroup | None, device: torch.device) -> nn.Module:
    assert group is not None
    if group.size() == 1:
        return module
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

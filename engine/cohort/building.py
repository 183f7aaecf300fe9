"""What builds a peer: network, head, average, optimiser, each with random numbers of its own."""

from __future__ import annotations

import contextlib
import copy
import sys
from collections.abc import Collection, Sequence
from functools import partial
from typing import TYPE_CHECKING, TypeVar

import torch
import torch.distributed as dist
from torch import nn

import models
from engine.cohort.averaging import averaged
from engine.cohort.compiling import Compiler
from engine.cohort.drop_path import DropPathSchedule
from engine.cohort.frozen import Frozen, reference
from engine.cohort.layout import channels_first, placed
from engine.cohort.optim import make_optimizer, set_weight_decay
from engine.cohort.outline import Outline, outline
from engine.cohort.parameter_groups import Said, said_by
from engine.cohort.peer import Peer, Resident
from engine.cohort.randomness import Streams
from engine.cohort.schedule import Schedule
from engine.cohort.teacher import Teacher
from engine.cohort.trunk import Trunk
from engine.config import OptimizerConfig, RunConfig
from engine.ranks.placement import Placement
from losses import METHODS, Method
from losses.capabilities import OuterProblem, OwnWeightDecay, SharedTrunk, Teachers, Unsynchronised, turns_of
from losses.functional import classifier
from models.freezing import freeze
from models.stages import Joined, Taps, cut
from models.weightless import weightless

if TYPE_CHECKING:
    from timm.utils import ModelEmaV3

_M = TypeVar("_M", bound=nn.Module)


class Builder:
    """Builds what of a run lives on this rank.

    Args:
        config: of the run.
        placement: of this rank.
        streams: of random numbers.
        replica_group: the ranks that hold the same peers.
        num_classes: of the data, whose images have `channels` and are `image_size` pixels wide.
        steps_per_epoch: which schedules are counted in.
        initial: whether the weights are read that peers start from; not where those of a checkpoint follow.
    """

    def __init__(
        self,
        config: RunConfig,
        placement: Placement,
        streams: Streams,
        replica_group: dist.ProcessGroup,
        *,
        num_classes: int,
        channels: int,
        image_size: int,
        steps_per_epoch: int,
        initial: bool,
    ) -> None:
        self._initial = initial and streams.device.type != "meta"
        self._config, self._placement, self._streams, self._replica_group = config, placement, streams, replica_group
        self._num_classes, self._channels, self._image_size = num_classes, channels, image_size
        self._steps_per_epoch = steps_per_epoch
        self._of_trunk: Said = {}
        on = config.precision.compile and streams.device.type != "meta"
        self.compiler = Compiler(streams.device, on, partial(print, file=sys.stderr, flush=True))
        self.schedules: list[Schedule | DropPathSchedule] = []
        """Of all optimisers that have been made."""

    def outline(self, index: int) -> Outline:
        """What the method may know of a peer, wherever that lives."""
        sizes = self._num_classes, self._channels, self._image_size
        return outline(self._config, index, *sizes, partial(self._copy, index))

    def method(self, outlines: Sequence[Outline]) -> Method:
        """The method, with the modules that all peers share. Raises: ValueError, where it excludes itself."""
        with self._streams.initial_method():
            method = METHODS[self._config.method.name](self._config.method, [outline.info for outline in outlines])
        train = self._config.train
        method.classify = classifier(train.loss, threshold=train.bce_threshold, sum_classes=train.bce_sum)
        frozen = len(self._config.learners) < len(self._config.trained)
        whole_at_once = len(turns(self._config)) == 1 and method.exchange != "differentiable" and not frozen
        if not whole_at_once and any(p.requires_grad for p in method.parameters()):
            # Their gradient is whole on every rank only if every rank computes the whole objective of its rows at once.
            raise ValueError(
                f"{method.name}: modules that all peers share need one turn, signals without gradient and peers that "
                "all learn"
            )
        self.compiler.objective(method)
        return self._placed(method)

    def trunk(self, outline: Outline, method: Method) -> Trunk | None:
        """The trunk that all peers share, if they share one, cut off the first peer's network."""
        if outline.trunk is None or not isinstance(method, SharedTrunk):
            return None
        whole = self._network(0, initial=True)
        self._of_trunk = said_by(whole, self._config.optimizer)
        module, _ = cut(whole, outline.trunk)
        below = {name: path for name, path in outline.taps.items() if _has(module, path)}
        taps = Taps(module, below, {})
        self.compiler.network(module, "the trunk")
        peers = self._placement.num_peers if method.trunk_gradient == "mean" else 1
        return Trunk(module, self.averaged_over_all(module), taps, _into_trunk(self._placement, peers))

    def resident(self, index: int, outline: Outline, method: Method, trunk: Trunk | None) -> Resident:
        """A peer that lives here."""
        name, own = self._config.cohort[index]
        head = self._head(index, outline, method)
        network = self._network(index, initial=True)
        config = self._config.optimizer_of(own)
        said = said_by(network, config)
        whole = network
        if trunk is not None and outline.trunk is not None:
            _, network = cut(network, outline.trunk)
            whole = Joined(trunk.module, network)
        ema = _average(whole, method, self._config, self._streams.device) if own.learns else None
        if isinstance(ema, Teacher):
            self.compiler.network(ema.module, f"the teacher that follows {name}")
        above = {name: path for name, path in outline.taps.items() if _has(network, path)}
        taps = Taps(network, above, outline.inputs) if outline.inputs else None
        self.compiler.network(network, name)
        outer = list(method.outer(head)) if head is not None and isinstance(method, OuterProblem) else []
        outer_optimizer = self.optimizer(nn.ParameterList(outer), config) if outer else None
        for p in outer:
            p.requires_grad_(False)
        peer = Peer(network, head, taps, [name for name in method.signals if name != "teacher"])
        names = {id(p): name for name, p in peer.named_parameters()}
        alone = [names[id(p)] for p in _unsynchronised(method, head)]
        return Resident(
            index=index,
            name=name,
            peer=peer,
            whole=whole,
            wrapped=averaged(peer, self._replica_group, self._streams.device, alone) if own.learns else Frozen(peer),
            unsynchronised=frozenset(alone),
            optimizer=self.optimizer(peer, config, said) if own.learns else None,
            parameters=list(peer.parameters()),
            classifier=frozenset(models.classifier_weights(whole)),
            outer={names[id(p)]: p for p in outer},
            outer_optimizer=outer_optimizer,
            ema=ema,
            reference=None if own.learns or self._streams.device.type == "meta" else reference(own, whole),
        )

    def optimizer(self, module: nn.Module, config: OptimizerConfig, said: Said | None = None) -> torch.optim.Optimizer:
        """An optimiser and its schedule, for a module that is on its device already, and what is said of its groups."""
        optimizer = make_optimizer(module, config, said)
        self._schedule(optimizer)
        return optimizer

    def idle(self) -> torch.optim.Optimizer:
        """An optimiser that goes through the steps on a rank where nothing learns, at the rate of the first learner."""
        first = next(peer for _, peer in self._config.cohort if peer.learns)
        number = nn.Parameter(torch.zeros(1, device=self._streams.device))
        return self.optimizer(nn.ParameterList([number]), self._config.optimizer_of(first))

    def shared_optimizer(self, shared: nn.Module, method: Method) -> torch.optim.Optimizer | None:
        """That of the modules that all peers share, if any of them learns."""
        if not any(p.requires_grad for p in shared.parameters()):
            return None
        optimizer = make_optimizer(shared, self._config.optimizer, self._of_trunk)
        if isinstance(method, OwnWeightDecay):
            set_weight_decay(optimizer, method.parameters(), method.weight_decay(self._config.method))
        self._schedule(optimizer)
        return optimizer

    def averaged_over_all(self, module: nn.Module) -> nn.Module:
        """A module as it is called in training, whose gradients are averaged over the world if it has any."""
        learns = any(p.requires_grad for p in module.parameters())
        return averaged(module, dist.group.WORLD, self._streams.device) if learns else module

    def _schedule(self, optimizer: torch.optim.Optimizer) -> None:
        config, per_epoch = self._config, self._steps_per_epoch
        self.schedules.append(Schedule(optimizer, config.schedule, config.train.steps(per_epoch), per_epoch))

    def _network(self, index: int, *, initial: bool = False) -> nn.Module:
        peer = self._config.cohort[index][1]
        on_meta = self._streams.device.type == "meta"
        wanted = initial and (self._initial or not (peer.learns or on_meta))
        pretrained = peer.pretrained if wanted else False
        with self._streams.initial_network(index), weightless(peer.network) if on_meta else contextlib.nullcontext():
            network = models.create(
                peer.network,
                self._num_classes,
                self._channels,
                pretrained=pretrained,
                entire=not peer.learns,
                **peer.options,
            )
        if initial:
            freeze(network, peer.frozen_parts)
        config, device = self._config, self._streams.device
        rows = config.data.global_batch / config.train.accumulation / self._placement.mean_replicas
        first = channels_first(config, peer, device, rows, self._channels, self._image_size)
        network = self._placed(network, first)
        return network if peer.learns else network.requires_grad_(False).eval()

    def _copy(self, index: int) -> nn.Module:
        network = self._network(index)
        self.compiler.network(network, f"a copy of {self._config.cohort[index][0]}")
        return network

    def _head(self, index: int, outline: Outline, method: Method) -> nn.Module | None:
        with self._streams.initial_head(index):
            head = method.head(outline.info)
        if head is None:
            return None
        if self._placement.replica and (mine := _unsynchronised(method, head)):
            with self._streams.initial_head(index, self._placement.replica):
                other = method.head(outline.info)
            for p, own in zip(mine, _unsynchronised(method, other), strict=True):
                p.data.copy_(own)
        return self._placed(head)

    def _placed(self, module: _M, first: Collection[str] = ()) -> _M:
        module = placed(module, self._streams.device, last=self._config.precision.channels_last != "off", first=first)
        if self._config.train.sync_bn and self._streams.device.type == "cuda":
            return _synchronised(module, self._replica_group)
        return module


def _synchronised(module: _M, group: dist.ProcessGroup) -> _M:
    # timm's own: torch's would drop the activation that is part of many of timm's normalisation layers. Here and below
    # it is not imported before it is wanted, as that takes seconds.
    from timm.layers import convert_sync_batchnorm

    synchronised: _M = convert_sync_batchnorm(module, group)
    return synchronised


def turns(config: RunConfig) -> Sequence[Sequence[int]]:
    """The peers that are updated together, turn after turn: all that learn at once, or as the method has it."""
    learn = [peer.learns for _, peer in config.cohort]
    found = turns_of(METHODS[config.method.name], config.method, len(learn))
    return [turn for turn in ([k for k in turn if learn[k]] for turn in found) if turn]


def _average(whole: nn.Module, method: Method, config: RunConfig, device: torch.device) -> ModelEmaV3 | Teacher | None:
    if isinstance(method, Teachers):
        return Teacher(whole)
    decay, warmup = config.train.ema_decay, config.train.ema_warmup
    if not decay:
        return None
    from timm.utils import ModelEmaV3

    if device.type != "meta":
        return ModelEmaV3(whole, decay=decay, use_warmup=warmup)
    # timm's asks the device for a generator, which meta does not have.
    average = ModelEmaV3(nn.Linear(1, 1), decay=decay, use_warmup=warmup)
    average.module = copy.deepcopy(whole).requires_grad_(False).eval()
    return average


def _unsynchronised(method: Method, head: nn.Module | None) -> Sequence[nn.Parameter]:
    return method.unsynchronised(head) if head is not None and isinstance(method, Unsynchronised) else ()


def _into_trunk(placement: Placement, peers: int) -> float:
    """What the gradients of the peers here are multiplied by on their way into a trunk, for the sum over all peers or,
    where `peers` is their number, the mean. They have the peers' own factor on them, see `Cohort.forward`."""
    return len(placement.groups) / peers * (placement.mean_replicas / placement.replicas)


def _has(network: nn.Module, path: str) -> bool:
    """Whether a part of a cut network has the submodule itself, not what was put in its place."""
    try:
        return not isinstance(network.get_submodule(path), nn.Identity)
    except AttributeError:
        return False

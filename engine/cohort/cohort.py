"""The part of a cohort that lives on this rank: peers with their heads, optimisers and averages, and the method."""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.parallel import DistributedDataParallel

from data_pipelines import Batch, Pipeline
from engine.cohort.buffers import Remembered, average_statistics, statistics_stay
from engine.cohort.building import Builder, turns
from engine.cohort.drop_path import DropPathSchedule
from engine.cohort.gradients import scale_gradient
from engine.cohort.precision import AUTOCAST, autocast, capturable, exact_products
from engine.cohort.randomness import Streams
from engine.cohort.side_by_side import SideBySide
from engine.cohort.teacher import Teacher
from engine.cohort.together import Together, alike, hindrance
from engine.config import ConfigError, RunConfig
from engine.ranks.collectives import group_of, leave
from engine.ranks.exchanging.exchange import Exchange
from engine.ranks.meeting import Meeting
from engine.ranks.placement import Placement, Share
from engine.ranks.planning.choosing import AUTO
from engine.ranks.planning.levels import judge_of
from engine.ranks.roll_call import program
from engine.ranks.tables import make_table
from losses import Progress, Signals, Terms
from losses.capabilities import AllRows, LooksAtImages, MeetsAsJobs, Tables, Teachers


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
        initial: bool = True,
    ) -> None:
        self.config, self.placement, self.device = config, placement, device
        self.num_classes, self.channels, self.image_size = num_classes, channels, image_size
        self.shares = placement.cut(config.data.global_batch, config.train.accumulation, config.data.tuple_size)
        """This rank's rows of a global batch, micro-batch by micro-batch."""
        self.replica_group = group_of(placement.replica_ranks)
        wire = torch.bfloat16 if config.placement.exchange_dtype == "bf16" else torch.float32
        judge = judge_of(config.placement.exchange, AUTO)
        self.exchange = Exchange(placement, group_of(placement.exchange_ranks), wire, judge)
        self.scaler = torch.amp.GradScaler(device.type, enabled=config.precision.amp == "fp16")
        self.autocast = AUTOCAST[config.precision.amp]
        self.streams = Streams(config.seed, placement.num_peers, placement.replica, device)
        sizes = {"num_classes": num_classes, "channels": channels, "image_size": image_size}
        sizes |= {"steps_per_epoch": steps_per_epoch}
        builder = Builder(config, placement, self.streams, self.replica_group, initial=initial, **sizes)
        self.compiler = builder.compiler
        outlines = [builder.outline(index) for index in range(placement.num_peers)]
        self.method = builder.method(outlines)
        self.turns = turns(config)
        self.meeting = None
        if placement.only is not None and isinstance(self.method, MeetsAsJobs):
            self.meeting = Meeting(config, placement, self.method.shapes_shown(), device)
        self.trunk = builder.trunk(outlines[0], self.method)
        self.shared = nn.ModuleDict({"method": self.method} | ({"trunk": self.trunk.module} if self.trunk else {}))
        self.wrapped_method = builder.averaged_over_all(self.method)
        self.shared_optimizer = builder.shared_optimizer(self.shared, self.method)
        self.shared_parameters = list(self.shared.parameters())
        self.residents = {k: builder.resident(k, outlines[k], self.method, self.trunk) for k in placement.residents}
        self.side_by_side = SideBySide.of(config, len(self.residents), device)
        self.together = compute_together(self) if config.train.batch_peers == "on" else None
        """What computes peers of one network as one; None: each by itself."""
        if self.together:
            self.together.take_over(self.residents)
        # Whose learning rate is that of this rank, and which keeps up the loss scale, where only frozen peers live.
        self.idle = None if any(r.optimizer for r in self.residents.values()) else builder.idle()
        self._schedules = [*builder.schedules, DropPathSchedule(config.train, self.residents, steps_per_epoch)]
        teachers = [r.ema for r in self.residents.values() if isinstance(r.ema, Teacher)]
        moving = [r.peer for r in self.residents.values() if r.optimizer is not None]
        self._remembered = Remembered([*moving, *teachers, self.shared])
        self.nothing = torch.zeros((), device=device)

    def prepare(self, classes: Tensor) -> None:
        """Tells a method that has `Tables` of the training images' classes, int64 [n]. Raises: ConfigError."""
        if not isinstance(self.method, Tables):
            return
        try:
            self.method.prepare(classes.to(self.device), partial(make_table, self.device))
        except ValueError as error:
            raise ConfigError(f"method.name = {self.method.name}: {error}") from None

    @property
    def views(self) -> Sequence[int]:
        """The augmentations of an image that this rank's peers see."""
        return self.placement.residents if self.config.data.views == "per_peer" else (0,)

    def views_of(self, batch: Batch) -> dict[int, Tensor]:
        """The images [N, channels, H, W] that each resident sees; the same tensor where they see the same."""
        return dict(zip(self.placement.residents, itertools.cycle(batch.views), strict=False))

    def close(self) -> None:
        """Leaves the groups of ranks that were made for this cohort, which is not used afterwards."""
        self.exchange.close()
        leave(self.replica_group)

    # -- a step -------------------------------------------------------------------------------------------------------

    def begin_step(self, step: int) -> None:
        """Sets the learning rates of update number `step`."""
        for schedule in self._schedules:
            schedule.step_update(step)

    def begin_update(self) -> None:
        """Drops old gradients, and remembers buffers in case of a skip."""
        for optimizer in self.optimizers():
            optimizer.zero_grad(set_to_none=True)
        self._remembered.begin()

    def restore_buffers(self, skip: Tensor) -> None:
        """Undoes what a skipped step has done to BatchNorm statistics; `skip` [1] is 1 for one that is skipped."""
        self._remembered.restore(skip)

    def look_again(self, batch: Batch, progress: Progress, micro: int, peers: Sequence[int]) -> Mapping[int, Signals]:
        """The signals of `peers` that live here, constant, after they were updated on the same batch, whose statistics
        theirs have followed already."""
        with torch.no_grad(), statistics_stay(self.residents[k].peer for k in peers if k in self.residents):
            return self.forward(batch, progress, micro, peers)

    @contextlib.contextmanager
    def gradients_stay_here(self, stay: bool) -> Iterator[None]:
        """Gradients of all but the last micro-batch are added up on the rank before they are averaged once."""
        wrapped = [*(r.wrapped for r in self.residents.values()), self.wrapped_method]
        wrapped += self.together.wrapped if self.together else []
        if self.trunk:
            wrapped.append(self.trunk.wrapped)
        with contextlib.ExitStack() as stack:
            for module in wrapped:
                if stay and isinstance(module, DistributedDataParallel):
                    stack.enter_context(module.no_sync())
            yield

    def forward(self, batch: Batch, progress: Progress, micro: int, peers: Sequence[int]) -> Mapping[int, Signals]:
        """The live signals of those of `peers` that live here, for this rank's rows, each on the view that it sees;
        where a trunk is shared, with its map as `trunk`."""
        views = {k: images for k, images in self.views_of(batch).items() if k in peers}
        with autocast(self.device, self.autocast):
            return _forward(self, views, progress, micro)

    @property
    def private(self) -> Sequence[str]:
        """The signals that a peer keeps to itself."""
        return (*self.method.private, "trunk")

    def share(
        self,
        own: Mapping[int, Signals],
        batch: Batch,
        share: Share,
        mode: Literal["none", "detached", "differentiable"] | None = None,
    ) -> Sequence[Signals]:
        """The one exchange of a step: live signals of the residents for this rank's `share` of a micro-batch -> those
        of all K peers, as the method wants them unless `mode` says otherwise."""
        everywhere = self.method.everywhere if isinstance(self.method, AllRows) else ()
        labels = (batch.targets, batch.ids) if everywhere else None
        mode = mode or self.method.exchange
        return self.exchange(own, mode, share=share, private=self.private, everywhere=everywhere, labels=labels)

    def objective(
        self, learners: Sequence[int], signals: Sequence[Signals], targets: Tensor, progress: Progress, micro: int
    ) -> Terms:
        """The method's terms for the learners that live here; none where no learner does."""
        if not learners:
            return {}
        self.streams.before_objective(progress.step, micro)
        with exact_products(self.device):
            return self.wrapped_method(learners, signals, targets, progress)

    def exchange_after(self, step: int, batch: Batch) -> Callable[..., Sequence[Signals]]:
        """What a method exchanges by after update number `step`, which was done on a batch."""
        if self.meeting is None:
            return self.exchange.whole
        [images] = self.views_of(batch).values()
        return partial(self.meeting, step=step + 1, answers=partial(_answers, self, images))

    def update_averages(self, step: int) -> None:
        """Moves the residents' averages and teachers, after update number `step`."""
        decay = self.method.teacher_decay(self.config.method, step) if isinstance(self.method, Teachers) else None
        for resident in self.residents.values():
            resident.update_average(decay, step)

    # -- between steps ------------------------------------------------------------------------------------------------

    def optimizers(self) -> list[torch.optim.Optimizer]:
        """Of each resident that learns, then of the method's shared modules, then of outer steps."""
        own = [r.optimizer for r in self.residents.values()]
        return [o for o in (*own, self.idle, self.shared_optimizer, *self.outer_optimizers()) if o is not None]

    def outer_optimizers(self) -> list[torch.optim.Optimizer]:
        """Of what outer steps move, of each resident that has some."""
        return [r.outer_optimizer for r in self.residents.values() if r.outer_optimizer is not None]

    def networks(self, ema: bool = False) -> dict[int, nn.Module]:
        """The residents' plain networks, or their moving averages."""
        if ema:
            return {k: average for k, r in self.residents.items() if (average := r.averaged) is not None}
        return {k: r.whole for k, r in self.residents.items()}

    def average_buffers(self) -> None:
        """BatchNorm statistics over all rows: one all-reduce of their mean in each replica group.

        Each rank's statistics are linear in its batches, so averaging now and going on is the same as averaging later.
        """
        own = [module for r in self.residents.values() for module in r.moving]
        # Of a method's other buffers only the method knows what they mean; in evaluation mode statistics stay fixed.
        shared = [module for module in self.method.modules() if isinstance(module, _BatchNorm) and module.training]
        trunk = [self.trunk.module] if self.trunk else []
        rows, batch = sum(len(share.rows) for share in self.shares), self.config.data.global_batch
        average_statistics(own, trunk, shared, self.placement, self.replica_group, rows, batch)


def compute_together(cohort: Cohort) -> Together | None:
    """What computes this rank's peers of one network as one; None where there is a hindrance, or no two are here."""
    groups = alike(cohort.config, cohort.placement)
    if not groups or hindrance(cohort.config, cohort.placement) is not None:
        return None
    return Together([[cohort.residents[k] for k in group] for group in groups], cohort.replica_group, cohort.device)


def _forward(cohort: Cohort, views: Mapping[int, Tensor], progress: Progress, micro: int) -> Mapping[int, Signals]:
    """See `Cohort.forward`."""
    step, factor = progress.step, cohort.placement.replicas / cohort.placement.mean_replicas
    signals: dict[int, Signals] = {}
    before = partial(cohort.streams.before_trunk, step, micro, per_peer=cohort.config.data.views == "per_peer")
    below = cohort.trunk(views, before) if cohort.trunk else {}
    whole = cohort.together(views) if cohort.together else {}
    for k, images in views.items():
        resident = cohort.residents[k]
        cohort.streams.before_peer(k, step, micro)
        found = whole.get(k)
        if found is None:
            shown = (below[k].map, below[k].taps) if k in below else (images, None)
            found = resident.wrapped(*shown)
        # DDP takes the mean over as many replicas as this peer has; losses are weighted for the mean number.
        signals[k] = {name: scale_gradient(x, factor) for name, x in found.items()}
        if k in below:
            signals[k] = {**signals[k], "trunk": below[k].plain}
        if isinstance(resident.ema, Teacher):
            cohort.streams.before_teacher(k, step, micro)
            signals[k] = {**signals[k], "teacher": resident.ema(images)}
    if isinstance(cohort.method, LooksAtImages):
        with torch.no_grad():
            seen = cohort.method.look(views, progress)
        signals = {k: {**own, **seen.get(k, {})} for k, own in signals.items()}
    return signals


def _answers(cohort: Cohort, images: Tensor, peer: int, shown: Signals) -> Tensor:
    """The logits that a peer of another job would give as it has shown itself."""
    assert isinstance(cohort.method, MeetsAsJobs)
    with autocast(cohort.device, cohort.autocast):
        return cohort.method.answers(peer, shown, images)


def open_cohort(
    pipeline: Pipeline, config: RunConfig, placement: Placement, device: torch.device, *, initial: bool = True
) -> Cohort:
    """The cohort for the images of a pipeline.

    Args:
        initial: whether the weights are read that peers start from; not where those of a checkpoint follow.

    Raises:
        ConfigError: the images are not fit for the method.
    """
    with capturable(config, device):
        cohort = Cohort(
            config,
            placement,
            device,
            num_classes=pipeline.num_classes,
            channels=pipeline.channels,
            image_size=pipeline.image_size,
            steps_per_epoch=pipeline.steps_per_epoch,
            initial=initial,
        )
    if pipeline.class_weights is not None:
        weight = torch.from_numpy(pipeline.class_weights).to(device)
        cohort.method.classify = partial(cohort.method.classify, weight=weight)
    cohort.prepare(torch.from_numpy(pipeline.train_targets))
    if cohort.meeting is not None:
        cohort.meeting.program = program(pipeline.contents)
    return cohort

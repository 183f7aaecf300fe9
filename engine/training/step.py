"""One training step, from top to bottom."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn

from data_pipelines import Batch
from engine.cohort.cohort import Cohort
from engine.cohort.optim import clip_units, gradient_norm, unscale, update
from engine.cohort.outer_step import outer_gradients
from engine.ranks.placement import Share
from engine.training.timing import Clock
from losses import Progress, Signals, Terms
from losses.capabilities import ActsAfterStep, AfterStep


class Outcome(NamedTuple):
    """What a step tells of itself, for the meter."""

    terms: Terms
    """Of the objective, detached: the sum over micro-batches, each weighted by its rows. Added up over the ranks of a
    group and divided by D, their mean number, they are means over the rows of the global batch."""
    norms: dict[int, Tensor]
    """The norm of each resident's gradient, before it was clipped."""
    skipped: Tensor
    """[1] on the device, 1 where the update was skipped because some rank met a non-finite number."""
    stop: Tensor
    """[1] on the device, the largest `stop` of any rank."""


class Update(NamedTuple):
    """What the update of a step has come to: an `Outcome`, and"""

    outcome: Outcome
    everywhere: Sequence[Sequence[Signals]]
    """turn after turn, the signals of all rows that every rank has seen."""


Updater = Callable[[Cohort, Sequence[Batch], Progress, Clock, Tensor], Update]
"""`update_peers`, or what does the same in another way."""


def train_step(
    cohort: Cohort,
    batches: Sequence[Batch],
    progress: Progress,
    clock: Clock,
    stop: Tensor | None = None,
    updater: Updater | None = None,
) -> Outcome:
    """One update of every peer from this rank's rows of one global batch.

    Args:
        cohort: what learns on this rank.
        batches: the micro-batches, one after another, as in `Cohort.shares`.
        progress: of the run; `progress.step` updates have been done.
        clock: told when each part of the step is over.
        stop: [1] on the device, the number of a signal that this rank got, 0 without. It travels with what the ranks
            agree on in every step anyway.
        updater: how peers are updated; None: `update_peers`.
    """
    stop = torch.zeros(1, device=cohort.device) if stop is None else stop
    cohort.begin_step(progress.step)
    (total, norms, skipped, stop), everywhere = (updater or update_peers)(cohort, batches, progress, clock, stop)
    cohort.scaler.update()
    if isinstance(cohort.method, ActsAfterStep):
        cohort.method.after_step(
            AfterStep(
                residents={k: r.peer for k, r in cohort.residents.items()},
                exchange=cohort.exchange_after(progress.step, batches[-1]),
                average_buffers=cohort.average_buffers,
                everywhere=everywhere,
                skipped=skipped,
                progress=progress,
            )
        )
    if cohort.outer_optimizers() and outer_gradients(cohort, batches[-1], cohort.shares[-1], progress):
        stop = _outer_update(cohort, stop)
    cohort.update_averages(progress.step)
    clock.mark("optimizer")
    return Outcome(total, norms, skipped, stop)


def update_peers(cohort: Cohort, batches: Sequence[Batch], progress: Progress, clock: Clock, stop: Tensor) -> Update:
    """Forward, exchange, objective, backward and optimisers: the device alone is asked for anything."""
    total: Terms = {}
    norms: dict[int, Tensor] = {}
    skipped = torch.zeros(1, device=cohort.device)
    everywhere: list[Sequence[Signals]] = []
    cohort.begin_update()

    for micro, (batch, share) in enumerate(zip(batches, cohort.shares, strict=True)):
        last = micro == len(batches) - 1
        with cohort.gradients_stay_here(not last):
            parts = _parts(cohort, share)
            for learners, signals, terms in _gradients(cohort, batch, share, progress, micro, clock):
                everywhere.append([_wide(peer) for peer in signals])
                for key, term in terms.items():
                    total[key] = total.get(key, 0) + term / parts
                if last:
                    skip, stop, found = _update(cohort, learners, total, stop)
                    skipped, norms = torch.maximum(skipped, skip), norms | found
                    clock.mark("optimizer")

    cohort.restore_buffers(skipped)
    return Update(Outcome(total, norms, skipped, stop), everywhere)


def _gradients(
    cohort: Cohort, batch: Batch, share: Share, progress: Progress, micro: int, clock: Clock
) -> Iterator[tuple[Sequence[int], Sequence[Signals], Terms]]:
    """Forward, exchange, objective and backward, turn after turn: the learners of a turn get a micro-batch's
    gradients, weighted by its rows, added to theirs. What the caller does to their weights before it asks for the next
    turn, that turn sees.

    Yields:
        The learners, the signals of all peers, and the detached terms.
    """
    forward, side_by_side = partial(cohort.forward, batch, progress, micro), cohort.side_by_side
    if side_by_side:
        seed = partial(cohort.streams.before_peer, step=progress.step, micro=micro)
        own = side_by_side(list(cohort.residents), forward, seed)
    else:
        own = dict(forward(range(cohort.placement.num_peers)))
    clock.mark("forward")
    for turn in cohort.turns:
        learners = [k for k in turn if k in cohort.residents]

        signals = cohort.share(own, batch, share)
        clock.mark("exchange")

        terms = cohort.objective(learners, signals, batch.targets, progress, micro)
        if terms:
            loss = torch.stack(list(terms.values())).sum() / _parts(cohort, share)
            cohort.scaler.scale(loss).backward()
            if side_by_side:
                side_by_side.backward()
        clock.mark("backward")
        yield learners, signals, {key: term.detach() for key, term in terms.items()}

        if turn is not cohort.turns[-1]:
            own |= cohort.look_again(batch, progress, micro, turn)
            clock.mark("forward")


def _parts(cohort: Cohort, share: Share) -> float:
    """What the mean over a share's rows is divided by: G / (n D) for n of G rows and groups of D ranks in the mean. The
    number of micro-batches where everything is even."""
    return cohort.config.data.global_batch / (len(share.rows) * cohort.placement.mean_replicas)


def settle(cohort: Cohort, progress: Progress, say: Callable[[str], None] | None = None) -> None:
    """Has DDP lay its buckets out.

    DDP lays its buckets out anew after the first backward pass, and the sum over three or more ranks rounds differently
    in another layout. So that a resumed run adds up like one that never stopped, the layout is settled before the
    first step of either; unless no gradient is averaged, here or elsewhere.

    Args:
        say: told in how many levels signals are exchanged, where that was a question.
    """
    placement = cohort.placement
    replicas = max(len(group.ranks) for group in placement.groups)
    if replicas == 1 and (placement.world == 1 or cohort.shared_optimizer is None):
        return
    rehearse(cohort, progress)
    if say and cohort.exchange.levels.remark:
        say(cohort.exchange.levels.remark)


def rehearse(cohort: Cohort, progress: Progress) -> None:
    """One pass forward and backward on black images, of which nothing is kept."""
    share = cohort.shares[0]
    cohort.begin_step(progress.step)
    cohort.begin_update()
    for _ in _gradients(cohort, blank(cohort, len(share.rows)), share, progress, 0, Clock(cohort.device)):
        pass
    cohort.restore_buffers(torch.ones(1, device=cohort.device))


def blank(cohort: Cohort, rows: int) -> Batch:
    """A batch of black images, of the shapes and types that training has."""
    side, device = cohort.image_size, cohort.device
    ids = torch.zeros(rows, dtype=torch.int64, device=device)
    soft = cohort.config.data.augmentation.soft_targets
    targets = torch.zeros(rows, cohort.num_classes, device=device) if soft else ids
    views = [torch.zeros(rows, cohort.channels, side, side, device=device) for _ in cohort.views]
    return Batch(tuple(view.contiguous(memory_format=torch.channels_last) for view in views), targets, ids)


def _update(
    cohort: Cohort, learners: Sequence[int], total: Terms, stop: Tensor
) -> tuple[Tensor, Tensor, dict[int, Tensor]]:
    """Steps the optimisers of this turn, unless some rank of the world met a non-finite loss or gradient.

    Returns:
        [1], whether it was skipped; the largest `stop` [1] of any rank; and the norm of each learner's gradient.
    """
    residents = [cohort.residents[k] for k in learners]
    learns: list[tuple[Sequence[nn.Parameter], torch.optim.Optimizer]] = [
        (r.parameters, r.optimizer) for r in residents if r.optimizer is not None
    ]
    if cohort.idle is not None and cohort.scaler.is_enabled():
        learns.append((_without_gradient(cohort.idle, cohort.scaler), cohort.idle))
    if cohort.shared_optimizer:
        learns.append((cohort.shared_parameters, cohort.shared_optimizer))
    norms = [gradient_norm(parameters) for parameters, _ in learns]
    losses = [term for (k, _), term in total.items() if k is None or k in learners]
    skip, stop = _agree(cohort, [*losses, *norms], stop)

    if cohort.scaler.is_enabled():
        for _, optimizer in learns:
            unscale(optimizer, skip, cohort.scaler)
        norms = [gradient_norm(parameters) for parameters, _ in learns]
    spared = {p for resident in residents for p in resident.classifier}
    for (parameters, optimizer), norm in zip(learns, norms, strict=True):
        if cohort.config.train.clip_factor:
            clip_units([p for p in parameters if p not in spared], cohort.config.train.clip_factor)
        if cohort.config.train.clip_norm:
            torch.nn.utils.clip_grads_with_norm_(parameters, cohort.config.train.clip_norm, norm)
        update(optimizer, skip, cohort.scaler)
    return skip, stop, {resident.index: norm for resident, norm in zip(residents, norms, strict=False)}


def _without_gradient(idle: torch.optim.Optimizer, scaler: torch.amp.GradScaler) -> list[nn.Parameter]:
    """A gradient of 0, from which the loss scale of a rank where nothing learns follows that of the others."""
    parameters: list[nn.Parameter] = idle.param_groups[0]["params"]
    scaler.scale(torch.stack([p.sum() * 0 for p in parameters]).sum()).backward()
    return parameters


def _outer_update(cohort: Cohort, stop: Tensor) -> Tensor:
    """Steps what the outer step has gradients for, unless they are non-finite somewhere. Returns: the agreed `stop`."""
    residents = [r for r in cohort.residents.values() if r.outer_optimizer is not None]
    skip, stop = _agree(cohort, [gradient_norm(r.outer.values()) for r in residents], stop)
    for resident in residents:
        assert resident.outer_optimizer is not None
        update(resident.outer_optimizer, skip, torch.amp.GradScaler(cohort.device.type, enabled=False))
    return stop


def _agree(cohort: Cohort, numbers: Sequence[Tensor], stop: Tensor) -> tuple[Tensor, Tensor]:
    """Two numbers [1], the same on all ranks of the world: 1 where one of them has a non-finite number, and the largest
    `stop`."""
    skip = 1 - torch.isfinite(torch.stack([cohort.nothing, *numbers])).all().float().reshape(1)
    if cohort.placement.world == 1:
        return skip, stop
    agreed = torch.cat([skip, stop])
    dist.all_reduce(agreed, dist.ReduceOp.MAX)
    return agreed[:1], agreed[1:]


def _wide(peer: Signals) -> Signals:
    return {name: x.detach() for name, x in peer.items() if name.startswith("all_")}

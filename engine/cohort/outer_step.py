"""Peers as functions of their parameters: what an outer step differentiates, twice."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial

import torch
import torch.distributed as dist
from torch import Tensor
from torch.func import functional_call

from data_pipelines import Batch
from engine.cohort.cohort import Cohort
from engine.cohort.precision import autocast, exact_products
from engine.cohort.second_derivative import DifferentiatedTwice
from engine.cohort.uncompiled import eagerly
from engine.ranks.placement import Share
from losses import Progress, Signals
from losses.capabilities import OuterProblem, OuterStep
from losses.functional import flat


def outer_gradients(cohort: Cohort, batch: Batch, share: Share, progress: Progress) -> bool:
    """Gives the residents' outer parameters the gradients that the method has for them, the mean over all replicas.

    Args:
        cohort: what learns on this rank.
        batch: its rows of a micro-batch.
        share: which rows these are.
        progress: of the run.

    Returns:
        Whether an outer step was due.
    """
    method = cohort.method
    assert isinstance(method, OuterProblem)
    groups = {k: r.optimizer.param_groups for k, r in cohort.residents.items() if r.optimizer is not None}
    decay = {k: {id(p): group["weight_decay"] for group in own for p in group["params"]} for k, own in groups.items()}
    replicas = cohort.placement.mean_replicas
    mean = partial(_mean, cohort.replica_group, replicas)
    named = {k: dict(r.peer.named_parameters()) for k, r in cohort.residents.items()}
    # torch.compile has no second derivative.
    with eagerly(), exact_products(cohort.device):
        found = method.outer_step(
            OuterStep(
                parameters=named,
                outer={k: list(r.outer) for k, r in cohort.residents.items()},
                show=partial(_show, cohort, batch, share, progress),
                average=mean,
                weight=len(share.rows) * replicas / share.batch,
                lr=next(iter(groups.values()))[0]["lr"],
                momentum=cohort.config.optimizer.momentum,
                weight_decay={
                    k: {name: decay[k].get(id(p), 0.0) for name, p in own.items()} for k, own in named.items()
                },
                targets=batch.targets,
                progress=progress,
            )
        )
    if found is None:
        return False
    for k, gradients in mean(found).items():
        for p, gradient in zip(cohort.residents[k].outer.values(), gradients, strict=True):
            p.grad = torch.empty_like(p).copy_(gradient)  # a fused update goes through memory as `p` lies in it
    return True


def _show(
    cohort: Cohort, batch: Batch, share: Share, progress: Progress, parameters: Mapping[int, Mapping[str, Tensor]]
) -> Sequence[Signals]:
    """The signals of all K peers as a function of the residents' parameters, see `OuterStep.show`."""
    own: dict[int, Signals] = {}
    views = cohort.views_of(batch)
    # float16 would need a scale of its own.
    dtype = torch.bfloat16 if cohort.autocast is torch.bfloat16 else None
    with DifferentiatedTwice(), autocast(cohort.device, dtype):
        for k, resident in cohort.residents.items():
            cohort.streams.before_peer(k, progress.step, 0)
            buffers = {name: b.clone() for name, b in resident.peer.named_buffers()}
            own[k] = functional_call(resident.peer, {**parameters[k], **buffers}, (views[k],))
    return cohort.share(own, batch, share, "differentiable")


def _mean(
    group: dist.ProcessGroup, replicas: float, tensors: Mapping[int, Sequence[Tensor]]
) -> dict[int, list[Tensor]]:
    """Of the residents' tensors over all replicas, see `OuterStep.average`: the sum by the mean number of replicas, for
    which objectives are weighted."""
    if group.size() == replicas == 1:
        return {k: list(own) for k, own in tensors.items()}
    every = [x for own in tensors.values() for x in own]
    row = flat(every)
    if group.size() > 1:
        dist.all_reduce(row, group=group)
    pieces = iter((row / replicas).split([x.numel() for x in every]))
    return {k: [next(pieces).view_as(x) for x in own] for k, own in tensors.items()}

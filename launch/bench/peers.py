"""What is measured: a cohort, the engine's step of it, and the bare loop that one would write instead."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

import models
from data_pipelines import Batch
from engine.cohort.cohort import Cohort
from engine.cohort.layout import channels_first, placed
from engine.cohort.precision import set_precision
from engine.config import RunConfig
from engine.config.loading import validate
from engine.ranks.collectives import Launch
from engine.ranks.planning.choosing import plan
from engine.training.meter import Meter
from engine.training.step import train_step
from engine.training.timing import Clock
from losses import Progress

CLASSES = 100
STEPS_PER_EPOCH = 1000


@dataclass(frozen=True)
class Workload:
    """Peers of one network, and the batch that they learn from."""

    network: str = "torchvision/resnet18"
    size: int = 32
    """Side of the images, in pixels."""
    batch: int = 64
    """Rows of a step, over all ranks."""
    amp: str = "float32"
    peers: int = 2
    compile: bool = False
    method: Mapping[str, Any] = field(default_factory=lambda: {"name": "dml"})
    """The section `method` of a config."""
    classes: int = CLASSES
    peer_threads: int = 1
    """`train.peer_threads` of a config."""
    views: str = "shared"
    """Whether peers see one augmentation of an image, or one each: `data.views` of a config."""
    channels_last: Literal["auto", "on", "off"] = "auto"
    """`precision.channels_last` of a config."""


def rows_of(work: Workload, device: torch.device) -> Batch:
    """Random images and classes on the device, the same on every rank; a view for each peer where each has its own."""
    generator = torch.Generator().manual_seed(0)
    images = torch.randn(work.batch, 3, work.size, work.size, generator=generator)
    targets = torch.randint(work.classes, (work.batch,), generator=generator)
    images = images.to(device, memory_format=torch.channels_last)
    views = tuple(images.clone() for _ in range(work.peers)) if work.views == "per_peer" else (images,)
    return Batch(views, targets.to(device), torch.arange(work.batch, device=device))


def config_of(work: Workload) -> RunConfig:
    """That of training."""
    return validate(
        {
            "name": "bench",
            "method": dict(work.method),
            "peers": [{"network": work.network, "copies": work.peers}],
            "data": {"dataset": "fashion_mnist_subset", "global_batch": work.batch, "views": work.views},
            "train": {"epochs": 1, "peer_threads": work.peer_threads},
            "schedule": {"name": "constant"},
            "precision": {"amp": work.amp, "compile": work.compile, "channels_last": work.channels_last},
        }
    )


def bench_cohort(work: Workload, device: torch.device, launch: Launch) -> Cohort:
    """This rank's part of the cohort, with the precision that training sets."""
    config = config_of(work)
    set_precision(config, device)
    cohort = Cohort(
        config,
        plan(config, launch.world, launch.rank),
        device,
        num_classes=work.classes,
        channels=3,
        image_size=work.size,
        steps_per_epoch=STEPS_PER_EPOCH,
    )
    cohort.prepare(torch.arange(10 * max(work.classes, work.batch)) % work.classes)
    return cohort


def engine_step(
    cohort: Cohort, work: Workload, clock: Clock | None = None, batches: Iterator[Batch] | None = None
) -> Callable[[], object]:
    """A step as `train.py` makes it, meter and clock included.

    Args:
        clock: one that is read by whoever gives it; without, the step reads its own every 50 steps.
        batches: this rank's rows of each step; without, rows that are there already.
    """
    placement, device = cohort.placement, cohort.device
    loads = batches is not None
    if batches is None:
        batch = rows_of(work, device)
        share = placement.rows(work.batch)
        views = tuple(batch.views[view][share] for view in cohort.views)
        batches = itertools.repeat(Batch(views, batch.targets[share], batch.ids[share]))
    meter, ticking = Meter(placement, device), clock or Clock(device)
    count = iter(range(1 << 62))

    def step() -> None:
        done = next(count)
        batch = next(batches)
        if loads:
            ticking.mark("data")
        meter.add(train_step(cohort, [batch], Progress(done, STEPS_PER_EPOCH, 1), ticking))
        if done % 50 == 49:
            meter.read()
            if clock is None:
                ticking.read()

    return step


def bare_step(work: Workload, device: torch.device) -> Callable[[], object]:
    """`dml` or `independent` as one would write it in plain PyTorch, with the same kernels at hand: the same layout of
    memory, autocast and the fused optimiser."""
    config, batch = config_of(work), rows_of(work, device)
    first = channels_first(config, config.peers[0], device, work.batch, 3, work.size)
    peers = [models.create(work.network, work.classes) for _ in range(work.peers)]
    peers = [placed(peer, device, last=work.channels_last != "off", first=first) for peer in peers]
    optimizers = [
        torch.optim.SGD(p.parameters(), lr=0.1, momentum=0.9, weight_decay=5e-4, nesterov=True, fused=True)
        for p in peers
    ]
    dtype = {"float32": None, "bf16": torch.bfloat16, "fp16": torch.float16}[work.amp]
    scaler = torch.amp.GradScaler(device.type, enabled=work.amp == "fp16")
    couple = {"dml": _mutual, "independent": _alone}[work.method["name"]]
    if work.compile:
        for peer in peers:
            peer.compile()

    def step() -> None:
        with torch.autocast(device.type, dtype=dtype, enabled=dtype is not None):
            logits = [peer(batch.images) for peer in peers]
        for optimizer in optimizers:
            optimizer.zero_grad(set_to_none=True)
        scaler.scale(couple([z.float() for z in logits], batch.targets)).backward()
        for optimizer in optimizers:
            scaler.step(optimizer)
        scaler.update()

    return step


def _alone(logits: list[Tensor], targets: Tensor) -> Tensor:
    return sum((F.cross_entropy(z, targets) for z in logits), torch.zeros((), device=targets.device))


def _mutual(logits: list[Tensor], targets: Tensor) -> Tensor:
    loss = _alone(logits, targets)
    if len(logits) == 1:
        return loss
    teachers = [F.softmax(z.detach(), 1) for z in logits]
    for k, z in enumerate(logits):
        student = F.log_softmax(z, 1)
        others = [p for j, p in enumerate(teachers) if j != k]
        loss = loss + sum(F.kl_div(student, p, reduction="batchmean") for p in others) / len(others)
    return loss

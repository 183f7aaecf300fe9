"""A cohort for measuring, the engine's step of it, and the bare loop that one would write instead."""

from __future__ import annotations

import argparse
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

import models
from data_pipelines import Batch
from engine.cohort.cohort import Cohort
from engine.config import RunConfig
from engine.config.loading import validate
from engine.ranks.collectives import Launch
from engine.ranks.placement import plan
from engine.training.meter import Meter
from engine.training.step import train_step
from engine.training.timing import Clock
from losses import Progress

CLASSES = 100


def rows_of(batch: int, size: int, device: torch.device) -> Batch:
    """Random images and classes, the same on every rank."""
    generator = torch.Generator().manual_seed(0)
    images = torch.randn(batch, 3, size, size, generator=generator)
    targets = torch.randint(CLASSES, (batch,), generator=generator)
    images = images.to(device, memory_format=torch.channels_last)
    return Batch((images,), targets.to(device), torch.arange(batch, device=device))


def bench_cohort(options: argparse.Namespace, method: str, device: torch.device, launch: Launch) -> Cohort:
    """Two peers of the network that is asked for."""
    config: RunConfig = validate(
        {
            "name": "bench",
            "method": {"name": method},
            "peers": [{"network": options.network, "copies": 2}],
            "data": {"dataset": "fashion_mnist_subset", "global_batch": options.batch},
            "train": {"epochs": 1},
            "schedule": {"name": "constant"},
            "precision": {"amp": options.amp},
        }
    )
    placement = plan(config, launch.world, launch.rank)
    return Cohort(
        config, placement, device, num_classes=CLASSES, channels=3, image_size=options.size, steps_per_epoch=1000
    )


def engine_step(cohort: Cohort, options: argparse.Namespace) -> Callable[[], object]:
    """A step as `train.py` makes it, meter and clock included, on rows that are there already."""
    placement, device = cohort.placement, cohort.device
    batch = rows_of(options.batch, options.size, device)
    share = placement.rows(options.batch)
    batch = Batch((batch.images[share],), batch.targets[share], batch.ids[share])
    meter, clock = Meter(placement, device), Clock(device)
    count = iter(range(1 << 62))

    def step() -> None:
        done = next(count)
        meter.add(train_step(cohort, [batch], Progress(done, 1000, 1), clock))
        if done % 50 == 49:
            meter.read()
            clock.read()

    return step


def bare_step(options: argparse.Namespace, device: torch.device) -> Callable[[], object]:
    """Deep mutual learning of two peers as one would write it in plain PyTorch, with the same kernels at hand:
    channels-last, autocast and the fused optimiser."""
    batch = rows_of(options.batch, options.size, device)
    peers = [models.create(options.network, CLASSES) for _ in range(2)]
    peers = [peer.to(device, memory_format=torch.channels_last) for peer in peers]  # type: ignore[call-overload]
    optimizers = [
        torch.optim.SGD(p.parameters(), lr=0.1, momentum=0.9, weight_decay=5e-4, nesterov=True, fused=True)
        for p in peers
    ]
    dtype = {"float32": None, "bf16": torch.bfloat16, "fp16": torch.float16}[options.amp]
    scaler = torch.amp.GradScaler(device.type, enabled=options.amp == "fp16")

    def loss(own: Tensor, other: Tensor) -> Tensor:
        kl = F.kl_div(F.log_softmax(own, 1), F.softmax(other.detach(), 1), reduction="batchmean")
        return F.cross_entropy(own, batch.targets) + kl

    def step() -> None:
        with torch.autocast(device.type, dtype=dtype, enabled=dtype is not None):
            a, b = (peer(batch.images) for peer in peers)
        for optimizer in optimizers:
            optimizer.zero_grad(set_to_none=True)
        scaler.scale(loss(a.float(), b.float()) + loss(b.float(), a.float())).backward()
        for optimizer in optimizers:
            scaler.step(optimizer)
        scaler.update()

    return step

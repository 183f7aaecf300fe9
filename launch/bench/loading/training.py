"""`launch/bench trainer`: one network that trains from photographs, against a loop of timm's parts."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch

import models
from data_pipelines import Batch
from engine.ranks.collectives import Launch
from launch.bench.loading import rivals
from launch.bench.loading.photos import epochs_of
from launch.bench.loading.rivals import Epoch
from launch.bench.peers import Workload, bench_cohort, engine_step
from launch.bench.turns import loading_in_turn, print_comparison


def training(
    folder: Path, side: int, batch: int, threads: int, rounds: int, steps: int, network: str, classes: int
) -> None:
    """Times whole steps, photographs included, in turn, and prints the ratio.

    Args:
        folder: with `train/CLASS/*.jpg`.
        side: of the crops, in pixels.
        batch: rows of a step.
        threads: that decode for ours, processes that do for timm's loader.
        rounds: timings of each, at least two.
        steps: in one timing.
        network: of either.
        classes: of the photographs, or more.

    Raises:
        ConfigError: no such folder, or too few images for a batch.
    """
    data = epochs_of(
        {
            "dataset": "image_folder",
            "root": str(folder),
            "global_batch": batch,
            "image": {"size": side},
            "decoding": {"threads": threads},
        }
    )
    work = Workload(network, side, batch, peers=1, method={"name": "independent"}, classes=classes)
    device = torch.device("cpu")
    ours: Iterator[Batch] = _without_end(data)
    variants = {
        "timm": _timm(network, classes, rivals.timm_folder(folder / "train", side, batch, threads)),
        "ours": engine_step(bench_cohort(work, device, Launch(0, 0, 1)), work, batches=ours),
    }
    print(
        f"trainer: {network}, {batch} crops of {side} pixels, {torch.get_num_threads()} threads, {threads} threads or "
        f"processes that decode, torch {torch.__version__}"
    )
    print_comparison(loading_in_turn(variants, rounds, steps), *variants)


def _timm(network: str, classes: int, data: Epoch) -> Callable[[], object]:
    """A step as timm's own training script makes it with its defaults: its loader, optimiser and meter."""
    from timm.optim import create_optimizer_v2
    from timm.utils import AverageMeter

    model = models.create(network, classes).train()
    optimizer = create_optimizer_v2(model, opt="sgd", lr=0.1, momentum=0.9, weight_decay=5e-4)
    criterion, batches, meter = torch.nn.CrossEntropyLoss(), _without_end(data), AverageMeter()

    def step() -> None:
        images, targets = next(batches)
        loss = criterion(model(images), targets)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        meter.update(loss.item(), len(images))

    return step


def _without_end(data: Epoch) -> Iterator[Any]:
    while True:
        yield from data()

"""Channels-last memory against channels first, network by network: `launch/bench layout`."""

from __future__ import annotations

import statistics
from dataclasses import replace
from typing import Literal

import torch
from torch import nn

import models
from engine.cohort.layout import channels_first
from engine.ranks.collectives import Launch
from launch.bench.peers import Workload, bench_cohort, config_of, engine_step
from launch.bench.turns import in_turn, ratio

CASES = (
    ("torchvision/resnet18", 32, 64),
    ("torchvision/resnet18", 64, 8),
    ("torchvision/resnet18", 64, 32),
    ("torchvision/resnet18", 64, 128),
    ("torchvision/resnet18", 224, 4),
    ("torchvision/resnet18", 224, 16),
    ("torchvision/resnet50", 64, 16),
    ("torchvision/resnet50", 224, 4),
    ("torchvision/mobilenet_v2", 96, 16),
    ("torchvision/densenet121", 64, 8),
    ("torchvision/resnext50_32x4d", 96, 4),
    ("cifar_resnet8_b", 32, 64),
    ("cifar_resnet32_b", 32, 64),
    ("cifar_wrn_16_4", 32, 32),
    ("cifar_vgg16", 32, 32),
    ("cifar_densenet_40_12", 32, 32),
)
"""Network, side of the images and rows of a step."""

LAYOUTS: dict[str, Literal["auto", "on", "off"]] = {"auto": "auto", "last": "on", "first": "off"}


def layout(rounds: int, steps: int, device: torch.device, launch: Launch, *, quick: bool) -> None:
    """A line for each case: how many convolutions `precision.channels_last: auto` has lie channels first, and the time
    of a step with channels last, and with channels first, over that of `auto`."""
    print(f"layout: float32, {device.type}, {torch.get_num_threads()} threads, torch {torch.__version__}")
    print(
        f"  {'':28} {'side':>4} {'rows':>4} {'first':>7} {'ms, auto':>9}  channels last / auto, channels first / auto"
    )
    for network, side, rows in CASES[:1] if quick else CASES:
        work = Workload(network, side, rows, peers=1, method={"name": "independent"})
        variants = {}
        for name, channels_last in LAYOUTS.items():
            each = replace(work, channels_last=channels_last)
            variants[name] = engine_step(bench_cohort(each, device, launch), each)
        times = in_turn(variants, rounds, steps, device)
        config = config_of(work)
        first = channels_first(config, config.peers[0], device, rows, 3, side)
        count = sum(isinstance(part, nn.Conv2d) for part in models.create(network, work.classes).modules())
        told = (ratio(times, name, "auto") for name in ("last", "first"))
        seconds = statistics.median(times["auto"])
        print(
            f"  {network:28} {side:4} {rows:4} {f'{len(first)}/{count}':>7} {1000 * seconds:9.1f}  "
            + ", ".join(f"{middle:.3f} ({low:.3f} to {high:.3f})" for low, middle, high in told),
            flush=True,
        )

"""Channels-last memory against channels first, network by network: `launch/bench layout`."""

from __future__ import annotations

import statistics
from dataclasses import replace

import torch

from engine.cohort.layout import MAPS_A_WEIGHT, maps_a_weight
from engine.ranks.collectives import Launch
from launch.bench.peers import Workload, bench_cohort, engine_step
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


def layout(rounds: int, steps: int, device: torch.device, launch: Launch, *, quick: bool) -> None:
    """A line for each case: numbers of maps for each weight, what `precision.channels_last: auto` makes of them on a
    CPU, and the time of a step with channels last over that with channels first."""
    print(f"layout: float32, {device.type}, {torch.get_num_threads()} threads, torch {torch.__version__}")
    print(f"  {'':28} {'side':>4} {'rows':>4} {'maps a weight':>13} {'auto':>5} {'ms, first':>9}  last / first")
    for network, side, rows in CASES[:1] if quick else CASES:
        work = Workload(network, side, rows, peers=1, method={"name": "independent"})
        variants = {}
        for name, channels_last in (("last", True), ("first", False)):
            each = replace(work, channels_last=channels_last)
            variants[name] = engine_step(bench_cohort(each, device, launch), each)
        times = in_turn(variants, rounds, steps, device)
        low, middle, high = ratio(times, "last", "first")
        maps = rows * maps_a_weight(network, {}, 3, side)
        print(
            f"  {network:28} {side:4} {rows:4} {maps:13.2f} {'last' if maps >= MAPS_A_WEIGHT else 'first':>5} "
            f"{1000 * statistics.median(times['first']):9.1f}  {middle:.3f} (quartiles {low:.3f} to {high:.3f})",
            flush=True,
        )

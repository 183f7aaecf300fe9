"""Measures the engine against what one would write instead, both timed in turn in one run.

    python launch/bench.py step                     the engine's step against a bare loop in plain PyTorch
    torchrun --nproc-per-node=2 launch/bench.py exchange    spread peers against the same peers uncoupled
    python launch/bench.py checkpoint               saving beside training, against waiting for the disk
    python launch/bench.py bytes                    not timed: what each method sends, from its signals' shapes
    python launch/bench.py lmcl                     L-MCL's objective with memory banks against one pair after another
    python launch/bench.py lmcl-step                a step of L-MCL against two networks alone, and its outer step

Absolute times belong to the machine; the ratio is the result. Machines wander, so variants take turns, and the median
of the ratios of neighbours is printed with its quartiles.
"""

from __future__ import annotations

import argparse
import platform
import statistics
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

import models
from data_pipelines import Batch
from engine.checkpoint import Saver, Standing
from engine.cohort import Cohort
from engine.collectives import Launch, choose_device, start
from engine.config import RunConfig
from engine.config_file import validate
from engine.exchange import NUMBERS_OF_A_ROW
from engine.meter import Meter
from engine.placement import plan
from engine.step import train_step
from engine.timing import Clock
from launch import bench_contrast
from launch.entry import parser, user_errors
from losses import METHODS, Progress

CLASSES = 100


def main() -> None:
    """The command."""
    arguments = parser(__doc__ or "", "")
    arguments.add_argument("what", choices=["step", "exchange", "checkpoint", "bytes", "lmcl", "lmcl-step"])
    arguments.add_argument("--network", default="torchvision/resnet18", help="of both peers (default: %(default)s)")
    arguments.add_argument("--size", type=int, default=32, help="side of the images (default: %(default)s)")
    arguments.add_argument("--batch", type=int, default=64, help="rows of a step (default: %(default)s)")
    arguments.add_argument("--rounds", type=int, default=15, help="timed pairs (default: %(default)s)")
    arguments.add_argument("--steps", type=int, default=3, help="steps in one timing (default: %(default)s)")
    arguments.add_argument("--amp", choices=["float32", "bf16", "fp16"], default="float32")
    arguments.add_argument("--batches", type=int, nargs="+", default=[8, 32], help="lmcl: rows (default: 8 32)")
    arguments.add_argument("--folder", type=Path, help="checkpoint: where to write (default: a temporary folder)")
    arguments.add_argument("--threads", type=int, help="CPU threads; torch's choice if absent")
    options = arguments.parse_args()
    launch = Launch.from_environment()
    if options.threads:
        torch.set_num_threads(options.threads)
    with user_errors(launch):
        if options.what in ("lmcl", "lmcl-step"):
            bench_contrast.objective(options) if options.what == "lmcl" else bench_contrast.training_step(options)
            dist.destroy_process_group()
            return
        device = choose_device("auto", launch)
        start(launch, device)
        if options.what == "bytes":
            for method in METHODS:
                print(f"  {method:16} {bytes_a_step(method):>12,}")
            dist.destroy_process_group()
            return
        if options.what == "checkpoint":
            saving(options, device, launch)
            dist.destroy_process_group()
            return
        if options.what == "step":
            engine = engine_step(bench_cohort(options, "dml", device, launch), options)
            variants = {"engine": engine, "bare loop": bare_step(options, device)}
        else:
            cohorts = {name: bench_cohort(options, name, device, launch) for name in ("dml", "independent")}
            variants = {name: engine_step(cohort, options) for name, cohort in cohorts.items()}
        compare(variants, options, device, launch)
        dist.destroy_process_group()


def bytes_a_step(method: str, network: str = "torchvision/resnet50", rows: int = 128, **options: Any) -> int:
    """What one peer sends in one step at ImageNet's shapes, in float32, taken from the signals of a real forward pass.

    To be called in a world of one rank.
    """
    num_peers = 3 if method == "okddip" else 2
    config = validate(
        {
            "name": "bytes",
            "device": "cpu",
            "method": {"name": method, **options},
            "peers": [{"network": network, "copies": num_peers}],
            "data": {"dataset": "fashion_mnist_subset", "global_batch": 2},
            "train": {"epochs": 1},
        }
    )
    cohort = Cohort(
        config,
        plan(config, 1, 0),
        torch.device("cpu"),
        num_classes=1000,
        channels=3,
        image_size=224,
        steps_per_epoch=1000,
    )
    if cohort.method.exchange == "none":
        return 0
    batch = Batch((torch.zeros(2, 3, 224, 224),), torch.zeros(2, dtype=torch.int64), torch.arange(2))
    with torch.no_grad():
        signals = cohort.forward(batch, Progress(0, 1000, 1), 0, [0])[0]
    assert all(len(x) == 2 for x in signals.values())
    numbers = sum(x.numel() for name, x in signals.items() if name not in cohort.method.private)
    if cohort.method.everywhere:
        numbers += 2 * NUMBERS_OF_A_ROW
    return numbers // 2 * rows * 4


def compare(
    variants: dict[str, Callable[[], object]], options: argparse.Namespace, device: torch.device, launch: Launch
) -> None:
    """Times two variants in turn and prints the ratio of the first to the second."""
    times: dict[str, list[float]] = {name: [] for name in variants}
    for done in range(options.rounds + 1):
        # Who goes first changes, so that a drift of the machine favours neither.
        for name in list(variants)[:: 1 if done % 2 else -1]:
            seconds = timed(variants[name], options.steps, device)
            if done:  # the first round warms up
                times[name].append(seconds / options.steps)
    one, other = variants
    ratios = [a / b for a, b in zip(times[one], times[other], strict=True)]
    low, middle, high = statistics.quantiles(ratios, n=4)
    if launch.rank == 0:
        print(headline(options, device, launch))
        for name, measured in times.items():
            print(f"  {name:12} {1000 * statistics.median(measured):8.2f} ms a step (median of {len(measured)})")
        print(f"  {one} / {other}: {middle:.3f} (quartiles {low:.3f} to {high:.3f})")


def headline(options: argparse.Namespace, device: torch.device, launch: Launch) -> str:
    """What was measured, on what."""
    where = torch.cuda.get_device_name(device) if device.type == "cuda" else f"CPU, {torch.get_num_threads()} threads"
    return (
        f"{options.what}: 2 x {options.network}, {options.size} px, {options.batch} rows, {options.amp}, "
        f"{launch.world} ranks, {where}, torch {torch.__version__}, {platform.machine()}"
    )


def saving(options: argparse.Namespace, device: torch.device, launch: Launch) -> None:
    """Times steps with a save at the start of each round: written beside them, waited for, and none, in turn."""
    cohort = bench_cohort(options, "dml", device, launch)
    step = engine_step(cohort, options)
    kinds = ("no save", "beside", "waited for")
    rounds: dict[str, list[float]] = {kind: [] for kind in kinds}
    blocked: dict[str, list[float]] = {kind: [] for kind in kinds}
    during: list[float] = []
    plain: list[float] = []
    with tempfile.TemporaryDirectory(dir=options.folder) as name:
        shared = [name]
        dist.broadcast_object_list(shared, src=0)
        run = Path(shared[0])
        saver = Saver(run, cohort, print)
        for done in range(options.rounds + 1):
            for kind in kinds[:: 1 if done % 2 else -1]:
                seconds, held = 0.0, 0.0
                if kind != "no save":
                    held = seconds = timed(partial(save, saver, done, wait=kind == "waited for"), 1, device)
                for _ in range(options.steps):
                    writing = saver.writing
                    seconds += (one := timed(step, 1, device))
                    if done and kind != "waited for":
                        (during if writing else plain).append(one)
                saver.wait()
                if done:  # the first round warms up
                    rounds[kind].append(seconds)
                    blocked[kind].append(held)
        size = sum(path.stat().st_size for path in run.rglob("*.pt"))
        saver.close()
    if launch.rank:
        return
    usual = statistics.median(plain)
    print(f"{headline(options, device, launch)}; {size / 1e6:.0f} MB a checkpoint")
    print(f"  a step while nothing is written: {1000 * usual:.1f} ms (median of {len(plain)})")
    if during:
        slower = statistics.median(during) / usual
        print(f"  a step begun while files are written: {slower:.3f} times that (median of {len(during)})")
    for kind in kinds[1:]:
        held = statistics.median(blocked[kind])
        print(f"  {kind:10} a save holds training up for {1000 * held:8.1f} ms, {held / usual:.2f} steps")
        extra = [a - b for a, b in zip(rounds[kind], rounds["no save"], strict=True)]
        low, middle, high = (1000 * x for x in statistics.quantiles(extra, n=4))
        print(f"  {'':10} in all, slower steps included, {middle:.1f} ms (quartiles {low:.1f} to {high:.1f})")


def save(saver: Saver, step: int, *, wait: bool) -> None:
    """One checkpoint, written beside training or waited for."""
    saver.save(Standing(step, None, 0, {}, 0), keep=1)
    if wait:
        saver.wait()


def timed(step: Callable[[], object], steps: int, device: torch.device) -> float:
    """Seconds for so many steps, begun by all ranks together."""
    if device.type == "cuda":
        torch.cuda.synchronize()
    dist.barrier()
    begin = time.perf_counter()
    for _ in range(steps):
        step()
    if device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - begin


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
        meter.add(*train_step(cohort, [batch], Progress(done, 1000, 1), clock))
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


if __name__ == "__main__":
    main()

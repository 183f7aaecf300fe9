"""What reading and writing files costs: saves, and the decoding of JPEGs."""

from __future__ import annotations

import statistics
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from data_pipelines import DataConfig, open_pipeline
from data_pipelines.contract import Pipeline
from data_pipelines.decoding.choice import INSTALL_DALI, dali_installed
from engine.training.meter import Meter
from engine.training.step import train_step
from engine.training.timing import Clock
from launch.bench.gpu.bench import Bench
from launch.bench.gpu.networks import free, tiny
from launch.bench.peers import STEPS_PER_EPOCH, Workload, bench_cohort, engine_step
from launch.bench.saving import KINDS, stall
from losses import Progress


def saving(bench: Bench) -> None:
    """Two ResNet-50 under DML, saved at every fourth step."""
    work = tiny(bench, Workload("torchvision/resnet50", 224, 64, "bf16", classes=1000))
    cohort = bench_cohort(work, bench.device, bench.launch)
    step = engine_step(cohort, work)
    rounds, steps = (2, 2) if bench.quick else (6, 4)
    with tempfile.TemporaryDirectory() as folder:
        found = stall(cohort, step, Path(folder), rounds, steps, bench.until(0.8, spare=6))
    usual = statistics.median(found.plain)
    bench.row("a step while nothing is written", ms=1000 * usual)
    if found.during:
        bench.row("a step begun while files are written", ms=1000 * statistics.median(found.during))
    for kind in KINDS[1:]:
        held = statistics.median(found.held[kind])
        name = "written beside training" if kind == "beside" else kind
        bench.row(
            f"a save of {found.megabytes:.0f} MB, {name}",
            ms=1000 * held,
            steps=found.in_steps(kind),
            **{"in all, ms": 1000 * found.extra(kind).middle},
        )


def decoding(bench: Bench) -> None:
    """Images a second that DALI decodes, and how long a ResNet-50 waits for them."""
    if not dali_installed():
        bench.row("not run", note=f"DALI is not installed: {INSTALL_DALI}")
        return
    files, batch, size = (48, 8, 64) if bench.quick else (2000, 128, 224)
    with tempfile.TemporaryDirectory() as folder:
        begin = time.perf_counter()
        make_photos(Path(folder), files)
        bench.row(f"{files} JPEGs of 500 x 375 made", seconds=time.perf_counter() - begin)
        decoders = ["cpu"] if bench.device.type != "cuda" else ["mixed", "cpu"]
        if bench.device.type != "cuda":
            bench.row("mixed", note="needs CUDA")
        threads = 2 if bench.quick else 8
        for decoder in decoders:
            data = DataConfig.model_validate(
                {
                    "dataset": "image_folder",
                    "root": folder,
                    "global_batch": batch,
                    "image": {"size": size, "resize": size + 32},
                    "decoding": {"decoder": decoder, "threads": threads},
                }
            )
            pipeline = open_pipeline(data, 0, bench.device)
            _decode_alone(bench, decoder, threads, pipeline)
            if decoder == "mixed" or bench.quick:
                _decode_under_training(bench, decoder, pipeline)
            pipeline.close()
            free()


def _decode_alone(bench: Bench, decoder: str, threads: int, pipeline: Pipeline) -> None:
    speeds, starts = [], []
    for epoch in range(2 if bench.quick else 5):
        begin = time.perf_counter()
        for done, _ in enumerate(pipeline.train(epoch, 0, slice(0, pipeline.global_batch))):
            if not done:
                first = _now(bench)
        starts.append(first - begin)
        speeds.append((pipeline.steps_per_epoch - 1) * pipeline.global_batch / (_now(bench) - first))
        if bench.left() < 25 and not bench.quick:
            break
    bench.row(
        f"{decoder}, {threads} threads, alone",
        **{"images/s": max(speeds), "images/s, first pass": speeds[0]},
        **{"until the first batch of a pass, s": min(starts)},
    )


def _decode_under_training(bench: Bench, decoder: str, pipeline: Pipeline) -> None:
    """What comes before the first batch of a pass is left out: of an epoch of ImageNet it is nothing."""
    work = Workload("torchvision/resnet50", pipeline.image_size, pipeline.global_batch, "bf16", 1, classes=1000)
    work = replace(work, method={"name": "independent"})
    if bench.quick:
        work = replace(work, network="cifar_resnet8_b", amp="float32")
    cohort = bench_cohort(work, bench.device, bench.launch)
    meter, clock = Meter(cohort.placement, bench.device), Clock(bench.device)
    seconds, images = 0.0, 0
    parts: dict[str, float] = {}
    for epoch in range(2 if bench.quick else 5):
        for done, batch in enumerate(pipeline.train(epoch, 0, slice(0, pipeline.global_batch))):
            clock.mark("data")
            meter.add(train_step(cohort, [batch], Progress(done, STEPS_PER_EPOCH, 1), clock))
            if not done:
                begin = _now(bench)
                clock.restart()
        if epoch:  # cuDNN searches in the first
            seconds += _now(bench) - begin
            images += (pipeline.steps_per_epoch - 1) * pipeline.global_batch
            parts = {part: parts.get(part, 0.0) + value for part, value in clock.read().items()}
        if bench.left() < 12 and epoch and not bench.quick:
            break
    bench.row(
        f"{decoder}, under {work.network}, {work.amp}",
        **{"images/s": images / seconds, "waiting for data, %": 100 * parts["data"] / sum(parts.values())},
    )


def _now(bench: Bench) -> float:
    if bench.device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter()


def make_photos(root: Path, count: int, classes: int = 4) -> None:
    """An image folder of JPEGs of 500 x 375 pixels, windows of one large picture that is smooth with some grain."""
    random = np.random.default_rng(0)
    coarse = Image.fromarray(random.integers(0, 256, (60, 80, 3), dtype=np.uint8)).resize(
        (2400, 1800), Image.Resampling.BICUBIC
    )
    grain = random.integers(-12, 13, (1800, 2400, 3))
    picture = np.clip(np.asarray(coarse).astype(int) + grain, 0, 255).astype(np.uint8)
    corners = random.integers(0, (1800 - 375, 2400 - 500), (count + classes, 2))
    for split in ("train", "val"):
        for c in range(classes):
            (root / split / f"class{c}").mkdir(parents=True)

    def save(index: int) -> None:
        top, left = corners[index]
        split = "train" if index < count else "val"
        path = root / split / f"class{index % classes}" / f"{index}.JPEG"
        Image.fromarray(picture[top : top + 375, left : left + 500]).save(path, quality=90)

    with ThreadPoolExecutor(8) as pool:
        list(pool.map(save, range(count + classes)))

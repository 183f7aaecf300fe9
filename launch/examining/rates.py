"""How fast a machine reads, decodes and trains, and which of them a run would wait for."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace

import numpy as np
import torch

from data_pipelines import open_pipeline
from data_pipelines.damage import UnreadableError
from data_pipelines.sources.opening import open_photos
from engine.config import RunConfig
from engine.ranks.planning.hardware import gpu_of
from engine.ranks.planning.planner import load_of
from launch.bench.passes import timed_peers

_SECONDS = 3.0
_READERS = 16
_ROWS_ON_CPU = 8
"""Of ImageNet's sizes: a step takes seconds."""


@dataclass(frozen=True)
class Rates:
    """Images a second of one rank."""

    read: float
    decoded: float
    trained: float


def read_rate(config: RunConfig) -> tuple[float, float]:
    """Photos and bytes a second that so many threads get from the storage, photos drawn at random.

    Photos that were read lately may come from memory: as many others as can be are asked for.
    """
    source, _ = open_photos(config.data.where)
    order = iter(np.random.default_rng().permutation(len(source)).tolist())
    begin = time.perf_counter()

    def read(index: int) -> int:
        if time.perf_counter() - begin > _SECONDS:
            return -1
        try:
            return len(source.read(index))
        except UnreadableError:
            return 0

    with ThreadPoolExecutor(_READERS) as pool:
        sizes = [size for size in pool.map(read, order) if size >= 0]
    seconds = time.perf_counter() - begin
    return len(sizes) / seconds, sum(sizes) / seconds


def decode_rate(config: RunConfig, device: torch.device) -> float:
    """Images a second of the run's own pipeline, augmentation included, with nothing else to do."""
    pipeline = open_pipeline(config.data, config.seed, device)
    images, begin = 0, 0.0
    try:
        # The first batch builds the graph and fills what works ahead.
        for number, batch in enumerate(pipeline.train(0, 0, slice(0, config.data.global_batch))):
            if device.type == "cuda":
                torch.cuda.synchronize()
            if number == 0:
                begin = time.perf_counter()
            else:
                images += len(batch.ids)
            if number and time.perf_counter() - begin > _SECONDS:
                break
        return images / (time.perf_counter() - begin) if images else 0.0
    finally:
        pipeline.close()


def train_rate(config: RunConfig, device: torch.device, classes: int) -> float:
    """Images a second that all peers of the cohort take on this device: forward, backward and update of each."""
    load = load_of(config, gpu_of("h100"), classes)  # of which only the peers are used, and timed here
    rows = load.batch // load.parts if device.type == "cuda" else min(load.batch, _ROWS_ON_CPU)
    load = replace(load, batch=rows, parts=1)
    timed = timed_peers(config, load, classes, 1)
    return rows / sum(sum(peer.seconds(rows)) for peer in timed)


def limits(rates: Rates, config: RunConfig, ranks: int) -> Iterator[str]:
    """What a rank would wait for, and what to do about it."""
    yield f"training: {rates.trained:,.0f} images/s of a rank with all {len(config.trained)} peers, decoding left out"
    need = rates.trained * ranks
    many = f"{ranks} rank{'s' * (ranks > 1)} of this machine train on"
    if not rates.decoded:
        yield "decoding: an epoch has one batch, too few to time"
    elif rates.decoded < need:
        yield f"decoding limits this run: it would wait {100 * (1 - rates.decoded / need):.0f} % of the time"
        yield f"  what helps: decoding.threads (now {config.data.decoding.threads}; there are {os.cpu_count()} cores),"
        yield "  decoding.decoder = mixed on GPUs, smaller photos (launch/shard.py --shorter-side 256), more cores"
    else:
        yield f"decoding keeps up: {rates.decoded / need:.1f} times what {many}"
    if rates.read < need:
        yield f"the storage limits this run: {rates.read:,.0f} photos/s, where {need:,.0f} are wanted"
        yield "  what helps: tar shards (launch/shard.py), which are read faster than files; a copy on a local disk"
    else:
        yield f"the storage keeps up: {rates.read / need:.1f} times what {many}"

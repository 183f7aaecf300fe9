"""`torchrun --nproc-per-node=2 launch/bench decode`: rows that all peers see, decoded once for them or by each."""

from __future__ import annotations

import time
from collections.abc import Iterator
from pathlib import Path

import torch
import torch.distributed as dist

from data_pipelines import Batch, open_pipeline
from engine.config import RunConfig
from engine.config.loading import validate
from engine.ranks.collectives import Launch
from engine.ranks.placement import Placement
from engine.training.sharing import share_decoding
from launch.bench.turns import print_comparison

WAYS = {"decoded once": "on", "by each rank": "off"}

STEPS = 4


def decode(folder: Path, batch: int, rounds: int, threads: int, launch: Launch) -> None:
    """Times batches of random crops of 224 pixels, on a rank for each of as many peers, and prints the ratio."""
    ways = {name: _batches(_config(folder, batch, threads, launch.world, way), launch) for name, way in WAYS.items()}
    times: dict[str, list[float]] = {name: [] for name in WAYS}
    for turn in range(rounds + 1):
        for name in WAYS:
            dist.barrier()
            begin = time.perf_counter()
            for _ in range(STEPS):
                next(ways[name])
            dist.barrier()
            if turn:  # In the first, threads start and caches fill.
                times[name].append((time.perf_counter() - begin) / STEPS)
    if launch.rank == 0:
        print(f"decode: {batch} rows of 224 pixels, {launch.world} ranks, a decoding thread count of {threads} each")
        print_comparison(times, *WAYS)
    for way in ways.values():
        way.close()  # type: ignore[attr-defined]


def _config(folder: Path, batch: int, threads: int, peers: int, way: str) -> RunConfig:
    return validate(
        {
            "name": "decode",
            "device": "cpu",
            "method": {"name": "independent"},
            "peers": [{"network": "cifar_resnet8_b", "copies": peers}],
            "data": {
                "dataset": "image_folder",
                "root": str(folder),
                "global_batch": batch,
                "shared_decode": way,
                "decoding": {"decoder": "torchvision", "threads": threads},
            },
            "train": {"epochs": 1},
        }
    )


def _batches(config: RunConfig, launch: Launch) -> Iterator[Batch]:
    """Without end."""
    placement = Placement.even(launch.world, 1, launch.world, launch.rank)
    pipeline = open_pipeline(config.data, 0, torch.device("cpu"))
    share_decoding(config, placement, pipeline)
    epoch = 0
    try:
        while True:
            yield from pipeline.train(epoch, 0, placement.rows(config.data.global_batch))
            epoch += 1
    finally:
        pipeline.close()

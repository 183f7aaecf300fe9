"""`launch/bench listing`: how long the first look at a folder of class folders takes, and each one after it."""

from __future__ import annotations

import os
import tempfile
import time
from pathlib import Path

import torch
from torchvision.datasets import ImageFolder
from tqdm import tqdm

from data_pipelines.sources.folders.class_folders import list_split
from launch.bench.turns import in_turn, quartiles

_CLASSES = 1_000
_TICK = 2.5
"""Seconds after which a folder's age is told from that of its listing."""


def listing(images: int, rounds: int, where: Path | None) -> None:
    """Times a listing anew, one that was kept, and torchvision's `ImageFolder`, of as many empty files as asked.

    Args:
        images: in 1,000 class folders, as ImageNet has 1,281,167.
        rounds: of each.
        where: in which folder the files are made; None: the system's place for such.
    """
    with tempfile.TemporaryDirectory(prefix="cohort-listing-", dir=where) as made:
        root, cache = Path(made) / "data", Path(made) / "cache"
        for number in tqdm(range(min(images, _CLASSES)), desc="making files", unit=" classes", disable=None):
            folder = root / "train" / f"n{number:08}"
            folder.mkdir(parents=True)
            for image in range(number, images, _CLASSES):
                os.close(os.open(folder / f"{folder.name}_{image:07}.JPEG", os.O_CREAT | os.O_WRONLY, 0o644))
        time.sleep(_TICK)
        train = root / "train"

        def anew() -> None:
            for kept in cache.rglob("*.npz"):
                kept.unlink()
            assert len(list_split(train, root, cache=cache).names) == images

        def kept() -> None:
            assert len(list_split(train, root, cache=cache).names) == images

        variants = {"anew": anew, "kept": kept, "torchvision's ImageFolder": lambda: ImageFolder(train)}
        times = in_turn(variants, rounds, 1, torch.device("cpu"))
        print(f"listing: {images:,} files in {min(images, _CLASSES):,} folders, names that the system has in memory")
        for name, measured in times.items():
            low, middle, high = quartiles(measured)
            print(f"  {name:26} {middle:8.3f} s (quartiles {low:.3f} to {high:.3f})")
        for ours in ("anew", "kept"):
            theirs = times["torchvision's ImageFolder"]
            low, middle, high = quartiles([b / a for a, b in zip(times[ours], theirs, strict=True)])
            print(f"  ImageFolder / {ours}: {middle:.2f} (quartiles {low:.2f} to {high:.2f})")

"""`launch/bench resident`: small images in memory, with AutoAugment and Cutout, against loaders of single images."""

from __future__ import annotations

import tempfile
from pathlib import Path

import numpy as np
import torch

from launch.bench.loading import rivals
from launch.bench.loading.photos import compare, epochs_of

_SIDE = 32


def small(count: int, batch: int, workers: int, rounds: int) -> None:
    """Times whole epochs over images whose contents do not matter here."""
    rng = np.random.default_rng(0)
    images = rng.integers(0, 256, (count, _SIDE, _SIDE, 3), dtype=np.uint8)
    labels = np.arange(count) % 10
    with tempfile.TemporaryDirectory() as name:
        for split in ("train", "val"):
            np.savez(Path(name, f"{split}.npz"), images=images, labels=labels)
        augmentation = {"padding": 4, "policy": {"name": "auto_augment_cifar10"}, "cutout": 16}
        ours = {
            "resident": epochs_of({"dataset": "npz", "root": name, "global_batch": batch, "augmentation": augmentation})
        }
    tensors = torch.from_numpy(images).permute(0, 3, 1, 2).contiguous(), torch.from_numpy(labels)
    theirs = {
        "torchvision": rivals.torchvision_small(*tensors, batch, workers),
        "timm (PIL)": rivals.timm_small(*tensors, batch, workers),
    }
    print(f"resident: {count:,} images of {_SIDE} pixels, AutoAugment, Cutout, {batch} at a time, {workers} processes")
    compare(ours, theirs, batch, rounds)

"""Fixtures of all rooms."""

from __future__ import annotations

import gzip
from pathlib import Path

import numpy as np
import pytest
import torch

from data_pipelines.config import DataConfig
from data_pipelines.sources.standard_sets import STANDARD

torch.set_num_threads(2)


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Fashion-MNIST's files with 120 training and 37 validation images of the real data."""
    folder = tmp_path_factory.mktemp("fashion_mnist")
    source = DataConfig(dataset="fashion_mnist_subset", global_batch=1).folder
    for stem, split, size in zip(("train", "t10k"), STANDARD["fashion_mnist"].read(source), (120, 37), strict=True):
        images, labels = split.images[:size], split.labels[:size].astype(np.uint8)
        for name, magic, array in (("images-idx3", 0x0803, images), ("labels-idx1", 0x0801, labels)):
            shape = (size, 28, 28) if array is images else (size,)
            header = np.array([magic, *shape], ">u4").tobytes()
            (folder / f"{stem}-{name}-ubyte.gz").write_bytes(gzip.compress(header + array.tobytes()))
    return folder

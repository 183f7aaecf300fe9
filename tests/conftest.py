"""Fixtures of all rooms."""

from __future__ import annotations

import gzip
import signal
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch

from data_pipelines.config import DataConfig
from data_pipelines.sources.standard_sets import STANDARD

# As a rank among others has, and so does one of several workers.
torch.set_num_threads(1)


def pytest_addoption(parser: pytest.Parser, pluginmanager: pytest.PytestPluginManager) -> None:
    """A machine lent for minutes may have pytest and nothing beside it; the settings are read there too."""
    if not pluginmanager.has_plugin("timeout"):
        parser.addini("timeout", "no test is ended early here")


def pytest_configure(config: pytest.Config) -> None:
    """The marker of the same plugin."""
    if not config.pluginmanager.has_plugin("timeout"):
        config.addinivalue_line("markers", "timeout(seconds): no test is ended early here")


@pytest.fixture(autouse=True)
def _signals() -> Iterator[None]:
    """A run in this process takes signals for itself, and ignores them at its end: what is started next would inherit
    that."""
    numbers = (signal.SIGHUP, signal.SIGINT, signal.SIGUSR1, signal.SIGUSR2, signal.SIGTERM)
    handlers = {number: signal.getsignal(number) for number in numbers}
    yield
    for number, handler in handlers.items():
        if handler is not None:
            signal.signal(number, handler)


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

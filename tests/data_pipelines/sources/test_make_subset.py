"""The subset is balanced, and the same wherever it is made."""

import hashlib
from pathlib import Path

import numpy as np
import pytest

from data_pipelines import DataConfig
from data_pipelines.sources.make_subset import balanced, main
from data_pipelines.sources.standard_sets import STANDARD

_SHIPPED = DataConfig(dataset="fashion_mnist_subset", global_batch=1).folder


def test_balanced_choice() -> None:
    labels = np.random.default_rng(0).integers(0, 4, 400)
    rows = balanced(labels, 7)
    assert np.bincount(labels[rows]).tolist() == [7] * 4
    assert (np.diff(rows) > 0).all()
    assert np.array_equal(rows, balanced(labels, 7))


@pytest.mark.slow
def test_the_subset_of_the_subset_is_itself(tmp_path: Path) -> None:
    main([str(_SHIPPED), str(tmp_path)])
    for path in sorted(tmp_path.iterdir()):
        # Neither a name (flags) nor a time in the header of gzip.
        assert path.read_bytes()[3:8] == bytes(5)
    for made, shipped in zip(STANDARD["fashion_mnist"].read(tmp_path), _read_shipped(), strict=True):
        assert np.array_equal(made.images, shipped.images)
        assert np.array_equal(made.labels, shipped.labels)


def test_the_shipped_images() -> None:
    digests = [
        hashlib.sha256(split.images.tobytes() + split.labels.astype("<i8").tobytes()).hexdigest()[:16]
        for split in _read_shipped()
    ]
    assert digests == ["94f30eb6c296fba6", "c57e939f24332f36"]


def _read_shipped() -> tuple:
    return STANDARD["fashion_mnist_subset"].read(_SHIPPED)

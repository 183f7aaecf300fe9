"""Makes the balanced subset of Fashion-MNIST that comes with the package.

    python -m data_pipelines.sources.make_subset SRC DST

SRC holds the four files of Fashion-MNIST; DST gets four files of the same names with 12,000 training and 2,000 test
images. The choice depends on nothing but the files, and with one version of zlib so do the bytes.
"""

import argparse
import gzip
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from data_pipelines import order
from data_pipelines.sources.standard_sets import STANDARD

TRAIN_PER_CLASS = 1200
TEST_PER_CLASS = 200


def make_subset(source: Path, target: Path) -> None:
    """Reads Fashion-MNIST from one folder and writes the subset into another, as gzipped IDX files.

    Raises:
        DataError: the files in ``source`` are missing, cut short or wrong.
    """
    target.mkdir(parents=True, exist_ok=True)
    train, test = STANDARD["fashion_mnist"].read(source)
    for stem, split, per_class in (("train", train, TRAIN_PER_CLASS), ("t10k", test, TEST_PER_CLASS)):
        rows = balanced(split.labels, per_class)
        images, labels = split.images[rows, :, :, 0], split.labels[rows].astype(np.uint8)
        _write_idx(target / f"{stem}-images-idx3-ubyte.gz", images)
        _write_idx(target / f"{stem}-labels-idx1-ubyte.gz", labels)


def balanced(labels: NDArray[np.int64], per_class: int) -> NDArray[np.int64]:
    """Returns the rows, ascending, of ``per_class`` samples of each class, chosen by a fixed Philox order.

    Args:
        labels: int64 [N].
        per_class: samples of each class.
    """
    shuffled = order.epoch_order(seed=0, epoch=0, size=len(labels))
    chosen = [shuffled[labels[shuffled] == label][:per_class] for label in np.unique(labels)]
    return np.sort(np.concatenate(chosen))


def main(arguments: Sequence[str] | None = None) -> None:
    """Runs the command line."""
    parser = argparse.ArgumentParser(
        prog="python -m data_pipelines.sources.make_subset", description=__doc__.splitlines()[0]
    )
    parser.add_argument("source", type=Path, metavar="SRC", help="folder with the four files of Fashion-MNIST")
    parser.add_argument("target", type=Path, metavar="DST", help="folder for the subset")
    options = parser.parse_args(arguments)
    make_subset(options.source, options.target)


def _write_idx(path: Path, array: NDArray[np.uint8]) -> None:
    header = np.array([0x0800 + array.ndim, *array.shape], ">u4").tobytes()
    # Neither a name nor a time in the gzip header: the same images give the same bytes.
    with path.open("wb") as file, gzip.GzipFile("", "wb", compresslevel=9, fileobj=file, mtime=0) as packed:
        packed.write(header + array.tobytes())


if __name__ == "__main__":
    main()

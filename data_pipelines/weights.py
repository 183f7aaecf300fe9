"""How much an image counts by its class: `data.class_weights`."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from data_pipelines.damage import DataError


def given(weights: str | Sequence[float] | Path, classes: Sequence[str]) -> NDArray[np.float64] | None:
    """The weights that are written down, a class each, float64 [K]; None for `balanced`, which the data say.

    Args:
        weights: of a config; a file has a line for each class, "CLASS WEIGHT" in any order, or the weight alone in the
            order of the classes.
        classes: names, in the order of labels.

    Raises:
        DataError: a class has none, or a weight is no positive number.
    """
    if weights == "balanced":
        return None
    if isinstance(weights, Path):
        values = _read(weights.expanduser(), classes)
    else:
        values = [float(weight) for weight in weights]
    if len(values) != len(classes):
        raise DataError(f"class_weights: expected a weight for each of {len(classes)} classes, found {len(values)}")
    for name, value in zip(classes, values, strict=True):
        if not 0 < value < float("inf"):
            raise DataError(f"class_weights: expected numbers above 0, found {value:g} for class {name!r}")
    return np.array(values)


def class_weights(
    weights: str | Sequence[float] | Path, labels: NDArray[np.int64], classes: Sequence[str]
) -> NDArray[np.float32]:
    """The weight of each class, float32 [K], scaled so that the mean over the training images is 1.

    `balanced` is w_c = N / (K n_c): all classes count alike, whatever their number of images n_c; K counts the classes
    that have any.

    Args:
        weights: of a config, see `given`.
        labels: of the images that are trained on, int64 [N].
        classes: names, in the order of labels.

    Raises:
        DataError: see `given`.
    """
    counts = np.bincount(labels, minlength=len(classes))
    values = given(weights, classes)
    if values is None:
        values = len(labels) / (np.count_nonzero(counts) * np.maximum(counts, 1))
        values[counts == 0] = 1.0
    return (values * len(labels) / (values @ counts)).astype(np.float32)


def _read(path: Path, classes: Sequence[str]) -> list[float]:
    try:
        lines = [line.strip() for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"class_weights: {path}: cannot be read: {error}") from None
    try:
        if all(len(line.split()) == 1 for line in lines):
            return [float(line) for line in lines]
        named = {name.rstrip(): float(weight) for name, weight in (line.rsplit(maxsplit=1) for line in lines)}
    except ValueError:
        raise DataError(f"class_weights: {path}: expected lines of a weight, or of a class and its weight") from None
    for name in classes:
        if name not in named:
            raise DataError(f"class_weights: {path} has no line for class {name!r}")
    return [named[name] for name in classes]

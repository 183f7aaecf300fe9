"""What a data set holds, in a few words that differ wherever two data sets do: ranks compare them, and so does a run
that goes on."""

import hashlib
from collections.abc import Iterable, Sequence

import numpy as np
from numpy.typing import NDArray

_DIGITS = 16
_SHOWN = 5


def contents(
    classes: Sequence[str],
    train: tuple[str | NDArray[np.uint8], NDArray[np.int64]],
    val: tuple[str | NDArray[np.uint8], NDArray[np.int64]],
) -> dict[str, str]:
    """Counts and SHA-256 of the classes in their order, and of the samples and the labels of both splits.

    Args:
        classes: their names, in the order of the labels.
        train: a SHA-256 of the names of the samples, as hex digits, or the images themselves, uint8 [N, H, W, C], and
            the labels, int64 [N]: in the order of ids.
        val: likewise.
    """
    names = ", ".join(classes[:_SHOWN]) + (", ..." if len(classes) > _SHOWN else "")
    names = names.encode("utf-8", "backslashreplace").decode()  # What is no text could not be kept in JSON.
    found = {"classes": f"{len(classes)} classes ({names}; {_of_names(classes)})"}
    for split, (samples, labels) in (("train", train), ("val", val)):
        digest = _of(samples) if isinstance(samples, np.ndarray) else samples[:_DIGITS]
        found[f"{split} samples"] = f"{len(labels)} samples ({digest})"
        found[f"{split} labels"] = f"{len(labels)} labels ({_of(labels)})"
    return found


def _of(array: NDArray[np.uint8] | NDArray[np.int64]) -> str:
    return hashlib.sha256(np.ascontiguousarray(array).data).hexdigest()[:_DIGITS]


def _of_names(names: Iterable[str]) -> str:
    # No name of a file holds a slash; surrogates stand for bytes that are no text.
    return hashlib.sha256("/".join(names).encode("utf-8", "surrogateescape")).hexdigest()[:_DIGITS]

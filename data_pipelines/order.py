"""Which sample a step sees, and the random numbers that augment it: a function of (seed, epoch, step) alone.

NumPy's Philox is counter-based, so any step of any epoch is reached at once, on any rank. Only its *raw* 64-bit output
is used: NumPy guarantees that stream for ever, while ``Generator.permutation``, ``random`` and the other methods may
change between versions. Sorting and scaling the raw words is done here, and the tests pin the numbers.
"""

import numpy as np
from numpy.typing import NDArray

# The second word of the key keeps the streams apart; the numbers are part of the format and never change.
_ORDER = 1
_AUGMENTATION = 2
_HELD_OUT = 3


def epoch_order(seed: int, epoch: int, size: int) -> NDArray[np.int64]:
    """Returns the order of an epoch: a permutation int64 [size] of 0 .. size - 1.

    Args:
        seed: 0 .. 2**64 - 1.
        epoch: the epoch, from 0.
        size: samples of the split.
    """
    # A stable sort has one right answer even for equal words, so no version of NumPy can answer differently.
    return np.argsort(_words(seed, _ORDER, epoch, 0, size), kind="stable").astype(np.int64)


def hold_out(seed: int, size: int, count: int) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Returns the samples that are trained on and the `count` that are held out, int64 each, ascending.

    Args:
        seed: 0 .. 2**64 - 1.
        size: samples of the split.
        count: 0 .. size.
    """
    drawn = np.argsort(_words(seed, _HELD_OUT, 0, 0, size), kind="stable").astype(np.int64)
    return np.sort(drawn[count:]), np.sort(drawn[:count])


def augmentation(seed: int, epoch: int, step: int, rows: int, columns: int, view: int = 0) -> NDArray[np.float64]:
    """Returns uniform numbers in [0, 1), float64 [rows, columns], for one *global* batch.

    Args:
        seed: 0 .. 2**64 - 1.
        epoch: the epoch, from 0.
        step: the step in the epoch, from 0.
        rows: samples of the global batch.
        columns: numbers that the augmentation needs for a sample.
        view: which of the independent augmentations of the batch, from 0.
    """
    words = _words(seed, _AUGMENTATION + (view << 32), epoch, step, rows * columns)
    # The upper 53 bits fill the mantissa of a float64 exactly.
    return ((words >> np.uint64(11)) * 2.0**-53).reshape(rows, columns)


def part(size: int, index: int, parts: int) -> range:
    """Returns the rows floor(index * size / parts) .. floor((index + 1) * size / parts) - 1.

    The parts are disjoint, cover 0 .. size - 1, and differ by at most one row.

    Raises:
        ValueError: index is not one of 0 .. parts - 1.
    """
    if not 0 <= index < parts:
        raise ValueError(f"part {index} of {parts}: expected 0 <= part < parts")
    return range(index * size // parts, (index + 1) * size // parts)


def _words(seed: int, stream: int, epoch: int, step: int, count: int) -> NDArray[np.uint64]:
    # The two low words of the counter run with the output, so steps and epochs sit above them and never overlap.
    counter = np.array([0, 0, step, epoch], np.uint64)
    words: NDArray[np.uint64] = np.random.Philox(key=np.array([seed, stream], np.uint64), counter=counter).random_raw(
        count
    )
    return words

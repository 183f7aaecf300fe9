"""Which sample a step sees, and the random numbers that augment it: a function of (seed, epoch, step) alone.

NumPy's Philox is counter-based, so any step of any epoch is reached at once, on any rank. Only its *raw* 64-bit output
is used: NumPy guarantees that stream for ever, while ``Generator.permutation``, ``random`` and the other methods may
change between versions. Sorting and scaling the raw words is done here, and the tests pin the numbers.
"""

import numpy as np
from numpy.typing import NDArray

Rows = slice | NDArray[np.int64]
"""Some rows of a global batch: neighbours, or their numbers, where a rank's micro-batches are not side by side."""

# The second word of the key keeps the streams apart; the numbers are part of the format and never change.
_ORDER = 1
_AUGMENTATION = 2
_HELD_OUT = 3
_CLASSES = 4
_IMAGES = 5
_LEFT_OUT = 6
_FRACTION = 20
_PURPOSES = {"policy": 7, "colour": 8, "erasing": 9, "cutout": 10, "mixing": 11}


def epoch_order(seed: int, epoch: int, size: int, turn: int = 0) -> NDArray[np.int64]:
    """Returns the order of an epoch: a permutation int64 [size] of 0 .. size - 1.

    Args:
        seed: 0 .. 2**64 - 1.
        epoch: the epoch, from 0.
        size: samples of the split.
        turn: which of the independent permutations of the epoch, from 0.
    """
    # A stable sort has one right answer even for equal words, so no version of NumPy can answer differently.
    return np.argsort(_words(seed, _ORDER, epoch, turn, size), kind="stable").astype(np.int64)


def class_balanced(
    seed: int, epoch: int, labels: NDArray[np.int64], steps: int, classes: int, images: int
) -> NDArray[np.int64]:
    """Returns an epoch of batches that know nothing of each other, int64 [steps, classes * images].

    For each batch the classes are shuffled; the first `classes` of them give `images` different samples each, which lie
    side by side. So an epoch shows some samples several times and others never: 37 % of CIFAR-100 in batches of 64 x 2.

    Args:
        seed: 0 .. 2**64 - 1.
        epoch: the epoch, from 0.
        labels: class of each sample, int64 [size] in 0 .. K - 1; each class has at least `images` samples.
        steps: batches of the epoch.
        classes: classes of a batch, at most K.
        images: samples of a class in a batch.
    """
    sizes = np.bincount(labels)
    chosen = np.empty((steps, classes), np.int64)
    for step in range(steps):
        chosen[step] = np.argsort(_words(seed, _CLASSES, epoch, step, len(sizes)), kind="stable")[:classes]
    owners = chosen.ravel()
    uniforms = _uniforms(_words(seed, _IMAGES, epoch, 0, len(owners) * images)).reshape(-1, images)
    places = (np.cumsum(sizes) - sizes)[owners, None] + _without_replacement(uniforms, sizes[owners])
    return np.argsort(labels, kind="stable")[places].reshape(steps, -1)


def class_tuples(seed: int, epoch: int, labels: NDArray[np.int64], classes: int, images: int) -> NDArray[np.int64]:
    """Returns an epoch of batches of classes that shows no sample twice, int64 [steps, classes * images].

    The n_c samples of a class are shuffled and cut into t_c = n_c // images tuples, whose samples lie side by side. The
    T = sum t_c tuples fill steps = T // classes batches. An epoch leaves out n_c % images samples of each class, and
    T % classes tuples: by chance, those first that a class has beyond one for each step. Nothing else is left out.

    Where r_c tuples of a class are left for L batches, the next batch takes floor(r_c / L) or ceil(r_c / L) of them,
    r_c / L on average, and which classes meet there is drawn anew for each batch. So a class comes twice in a batch
    only if it has more tuples than there are steps, and then as evenly over the batches as whole numbers allow.

    Args:
        seed: 0 .. 2**64 - 1.
        epoch: the epoch, from 0.
        labels: class of each sample, int64 [size] in 0 .. K - 1.
        classes: tuples of a batch.
        images: samples of a tuple.
    """
    sizes = np.bincount(labels)
    steps = class_tuples_steps(labels, classes, images)
    left = _keep(_words(seed, _LEFT_OUT, epoch, 0, len(labels)), sizes // images, steps, classes)
    # Where each tuple begins among the shuffled samples, class by class.
    begins = np.repeat(np.cumsum(sizes) - sizes, left) + images * _ranks(left)
    chosen = np.empty((steps, classes), np.int64)
    for step in range(steps):
        words = _words(seed, _CLASSES, epoch, step, len(sizes) + 1)
        company = np.argsort(words[:-1], kind="stable")
        # The tuples that are left, laid out class by class: every L-th of them, where L batches are left to fill.
        stride = steps - step
        points = int(_uniforms(words[-1:])[0] * stride) + stride * np.arange(classes)
        chosen[step] = company[np.searchsorted(np.cumsum(left[company]), points, side="right")]
        left -= np.bincount(chosen[step], minlength=len(sizes))
    places = np.empty(steps * classes, np.int64)
    places[np.argsort(chosen.ravel(), kind="stable")] = begins
    shuffled = np.lexsort((_words(seed, _IMAGES, epoch, 0, len(labels)), labels))
    return shuffled[places[:, None] + np.arange(images)].reshape(steps, -1)


def class_tuples_steps(labels: NDArray[np.int64], classes: int, images: int) -> int:
    """Returns the batches of an epoch of :func:`class_tuples`, the same in every epoch."""
    return int((np.bincount(labels) // images).sum()) // classes


def hold_out(seed: int, size: int, count: int) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Returns the samples that are trained on and the `count` that are held out, int64 each, ascending.

    Args:
        seed: 0 .. 2**64 - 1.
        size: samples of the split.
        count: 0 .. size.
    """
    drawn = np.argsort(_words(seed, _HELD_OUT, 0, 0, size), kind="stable").astype(np.int64)
    return np.sort(drawn[count:]), np.sort(drawn[:count])


def fraction(seed: int, labels: NDArray[np.int64], part: float) -> NDArray[np.int64]:
    """Returns the samples of a part of each class, ascending, int64; those of a smaller part are among them.

    Of n_c samples of a class max(1, floor(part n_c + 1/2)) are kept.

    Args:
        seed: 0 .. 2**64 - 1.
        labels: class of each sample, int64 [size].
        part: above 0, at most 1.
    """
    shuffled = np.lexsort((_words(seed, _FRACTION, 0, 0, len(labels)), labels))
    sizes = np.bincount(labels)
    return np.sort(shuffled[_ranks(sizes) < np.repeat(fraction_sizes(sizes, part), sizes)])


def fraction_sizes(sizes: NDArray[np.int64], part: float) -> NDArray[np.int64]:
    """Returns how many samples of each class :func:`fraction` keeps."""
    return np.minimum(sizes, np.maximum(np.floor(part * sizes + 0.5), 1).astype(np.int64))


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
    return _uniforms_of(_AUGMENTATION, seed, epoch, step, rows, columns, view)


def uniforms(
    purpose: str, seed: int, epoch: int, step: int, rows: int, columns: int, view: int = 0
) -> NDArray[np.float64]:
    """The same from another stream for each purpose: policy, colour, erasing, cutout or mixing."""
    return _uniforms_of(_PURPOSES[purpose], seed, epoch, step, rows, columns, view)


def part(size: int, index: int, parts: int) -> range:
    """Returns the rows floor(index * size / parts) .. floor((index + 1) * size / parts) - 1.

    The parts are disjoint, cover 0 .. size - 1, and differ by at most one row.

    Raises:
        ValueError: index is not one of 0 .. parts - 1.
    """
    if not 0 <= index < parts:
        raise ValueError(f"part {index} of {parts}: expected 0 <= part < parts")
    return range(index * size // parts, (index + 1) * size // parts)


def _uniforms_of(
    stream: int, seed: int, epoch: int, step: int, rows: int, columns: int, view: int
) -> NDArray[np.float64]:
    words = _words(seed, stream + (view << 32), epoch, step, rows * columns)
    return _uniforms(words).reshape(rows, columns)


def _words(seed: int, stream: int, epoch: int, step: int, count: int) -> NDArray[np.uint64]:
    # The two low words of the counter run with the output, so steps and epochs sit above them and never overlap.
    counter = np.array([0, 0, step, epoch], np.uint64)
    words: NDArray[np.uint64] = np.random.Philox(key=np.array([seed, stream], np.uint64), counter=counter).random_raw(
        count
    )
    return words


def _uniforms(words: NDArray[np.uint64]) -> NDArray[np.float64]:
    # The upper 53 bits fill the mantissa of a float64 exactly.
    return (words >> np.uint64(11)) * 2.0**-53


def _without_replacement(uniforms: NDArray[np.float64], sizes: NDArray[np.int64]) -> NDArray[np.int64]:
    """Turns each row of uniforms [n, m] into m different numbers of 0 .. size - 1, every choice equally likely."""
    drawn = np.empty(uniforms.shape, np.int64)
    for column in range(uniforms.shape[1]):
        number = (uniforms[:, column] * (sizes - column)).astype(np.int64)
        # The number-th of those that are left: one further for each that is gone up to there.
        for gone in np.sort(drawn[:, :column], axis=1).T:
            number += number >= gone
        drawn[:, column] = number
    return drawn


def _keep(words: NDArray[np.uint64], tuples: NDArray[np.int64], steps: int, classes: int) -> NDArray[np.int64]:
    """Returns how many of its tuples each class keeps, so that together they fill the steps."""
    too_many = _ranks(tuples) >= steps
    drawn = np.lexsort((words[: len(too_many)], ~too_many))
    owners = np.repeat(np.arange(len(tuples)), tuples)
    return np.bincount(owners[drawn[len(drawn) - steps * classes :]], minlength=len(tuples))


def _ranks(counts: NDArray[np.int64]) -> NDArray[np.int64]:
    """0 .. count - 1 for each of the counts, one after another."""
    return np.arange(counts.sum()) - np.repeat(np.cumsum(counts) - counts, counts)

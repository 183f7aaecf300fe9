"""The order of the data and its random numbers change with the seed, the epoch and the step, and with nothing else."""

import hashlib

import numpy as np
import pytest

from data_pipelines import order

_MASK = 2**64 - 1


def _philox(key: tuple[int, int], counter: int) -> list[int]:
    """Philox4x64-10 of Salmon et al. 2011, in integers."""
    words = [counter >> 64 * i & _MASK for i in range(4)]
    low, high = key
    for _ in range(10):
        a, b = 0xD2E7470EE14C6C93 * words[0], 0xCA5A826395121157 * words[2]
        words = [b >> 64 ^ words[1] ^ low, b & _MASK, a >> 64 ^ words[3] ^ high, a & _MASK]
        low, high = (low + 0x9E3779B97F4A7C15) & _MASK, (high + 0xBB67AE8584CAA73B) & _MASK
    return words


def _words(seed: int, stream: int, epoch: int, step: int, count: int) -> list[int]:
    # NumPy counts up before each block of four.
    start = (epoch << 192) + (step << 128) + 1
    return [word for block in range(-(-count // 4)) for word in _philox((seed, stream), start + block)][:count]


def test_golden_order() -> None:
    assert order.epoch_order(7, 2, 10).tolist() == [4, 1, 3, 2, 6, 8, 5, 0, 9, 7]
    assert order.epoch_order(7, 3, 10).tolist() == [0, 2, 7, 6, 4, 1, 8, 9, 5, 3]
    digest = hashlib.sha256(order.epoch_order(1, 0, 100_000).astype("<i8").tobytes()).hexdigest()
    assert digest == "a3adf3cd9b5d999e9e7e0c93f8d2bf8f38d8160fb55a074173c57bd1e53572ea"


def test_golden_augmentation() -> None:
    assert order.augmentation(7, 2, 5, 2, 3).tolist() == [
        [0.38321582535963916, 0.877685183352081, 0.802852744768432],
        [0.1973730423621045, 0.11029408984046285, 0.02659182759200962],
    ]
    digest = hashlib.sha256(order.augmentation(1, 89, 5003, 1024, 23).astype("<f8").tobytes()).hexdigest()
    assert digest == "a785a3e598b7704271ba5e27c99a69d4e9831d28855a38454162f5563222981c"


@pytest.mark.parametrize(("seed", "epoch", "step"), [(0, 0, 0), (7, 2, 5), (2**64 - 1, 10**6, 10**9)])
def test_against_philox_in_integers(seed: int, epoch: int, step: int) -> None:
    words = _words(seed, 2, epoch, step, 33)
    assert order.augmentation(seed, epoch, step, 11, 3).ravel().tolist() == [(word >> 11) / 2**53 for word in words]
    words = _words(seed, 1, epoch, 0, 50)
    assert order.epoch_order(seed, epoch, 50).tolist() == sorted(range(50), key=words.__getitem__)


_LABELS = np.array([0, 1, 2, 0, 1, 2, 0, 1, 0, 3, 3, 3])
_CIFAR_100 = np.arange(50_000) * 7 % 100  # as many images and classes


def test_golden_classes() -> None:
    assert order.class_balanced(7, 2, _LABELS, 3, 2, 2).tolist() == [[10, 9, 5, 2], [6, 0, 2, 5], [1, 4, 11, 10]]
    assert order.class_tuples(7, 2, _LABELS, 2, 2).tolist() == [[9, 11, 1, 4], [8, 6, 5, 2]]
    assert order.class_tuples(7, 3, _LABELS, 2, 2).tolist() == [[7, 4, 3, 0], [9, 10, 6, 8]]
    digests = [
        hashlib.sha256(drawn.astype("<i8").tobytes()).hexdigest()
        for drawn in (order.class_balanced(1, 0, _CIFAR_100, 390, 64, 2), order.class_tuples(1, 0, _CIFAR_100, 64, 2))
    ]
    assert digests == [
        "7e9d6bfdb79644dc3823811512ce4a98e7cc66645873edc0e5c9b5f49880c711",
        "144fb55828b00de885f282a9eed56bbd5f03de76417a0d008464cbf2cbbc8745",
    ]


def _labels(*sizes: int) -> np.ndarray:
    """So many samples of each class, the classes interleaved."""
    return np.random.default_rng(0).permutation(np.repeat(np.arange(len(sizes)), sizes))


# Samples of each class, classes of a batch, images of each: even, uneven, of all classes, one batch, and with classes
# that have more tuples than there are batches, a few or many.
_SHAPES = [
    ((6,) * 10, 4, 2),
    ((7, 2, 9, 4, 5, 12), 3, 2),
    ((8, 11, 9), 3, 3),
    ((2, 2, 3), 3, 2),
    ((13, 8, 6), 2, 2),
    ((40, 4, 5, 6), 3, 2),
    ((30, 31, 2, 2), 4, 2),
]


@pytest.mark.parametrize(("sizes", "classes", "images"), _SHAPES)
@pytest.mark.parametrize(("seed", "epoch"), [(0, 0), (2**64 - 1, 10**6)])
def test_classes_against_lists_of_integers(
    sizes: tuple[int, ...], classes: int, images: int, seed: int, epoch: int
) -> None:
    labels = _labels(*sizes)
    drawn = order.class_balanced(seed, epoch, labels, 5, classes, images)
    assert drawn.tolist() == _slow_class_balanced(seed, epoch, labels, 5, classes, images)
    drawn = order.class_tuples(seed, epoch, labels, classes, images)
    assert drawn.tolist() == _slow_class_tuples(seed, epoch, labels, classes, images)


def _slow_class_balanced(
    seed: int, epoch: int, labels: np.ndarray, steps: int, classes: int, images: int
) -> list[list[int]]:
    kinds = range(max(labels) + 1)
    numbers = iter(word >> 11 for word in _words(seed, 5, epoch, 0, steps * classes * images))
    batches = []
    for step in range(steps):
        batch = []
        for kind in sorted(kinds, key=_words(seed, 4, epoch, step, len(kinds)).__getitem__)[:classes]:
            left = np.flatnonzero(labels == kind).tolist()
            batch += [left.pop(next(numbers) * len(left) >> 53) for _ in range(images)]
        batches.append(batch)
    return batches


def _slow_class_tuples(seed: int, epoch: int, labels: np.ndarray, classes: int, images: int) -> list[list[int]]:
    kinds = range(max(labels) + 1)
    words = _words(seed, 5, epoch, 0, len(labels))
    shuffled = [sorted(np.flatnonzero(labels == kind).tolist(), key=words.__getitem__) for kind in kinds]
    piles = [[pile[i : i + images] for i in range(0, len(pile) - images + 1, images)] for pile in shuffled]
    steps = sum(map(len, piles)) // classes
    tuples = [(place < steps, kind) for kind in kinds for place in range(len(piles[kind]))]
    words = _words(seed, 6, epoch, 0, len(tuples))
    for index in sorted(range(len(tuples)), key=lambda i: (tuples[i][0], words[i]))[: len(tuples) % classes]:
        piles[tuples[index][1]].pop()
    batches = []
    for left in range(steps, 0, -1):
        *words, last = _words(seed, 4, epoch, steps - left, len(kinds) + 1)
        deck = [kind for kind in sorted(kinds, key=words.__getitem__) for _ in piles[kind]]
        batches.append([each for kind in deck[(last >> 11) * left >> 53 :: left] for each in piles[kind].pop(0)])
    return batches


def _assert_tuples(labels: np.ndarray, batches: np.ndarray, classes: int, images: int) -> np.ndarray:
    """Checks that each batch is made of tuples of different images of one class; gives the classes [steps, tuples]."""
    assert batches.dtype == np.int64
    assert batches.shape[1] == classes * images
    tuples = np.sort(batches.reshape(len(batches), classes, images))
    assert (np.diff(tuples) > 0).all()
    kinds = labels[tuples]
    assert (kinds == kinds[..., :1]).all()
    return kinds[..., 0]


@pytest.mark.parametrize(("sizes", "classes", "images"), [*_SHAPES, ((500,) * 100, 64, 2)])
def test_class_balanced_batches_hold_different_classes(sizes: tuple[int, ...], classes: int, images: int) -> None:
    labels = _labels(*sizes)
    kinds = _assert_tuples(labels, order.class_balanced(3, 1, labels, 20, classes, images), classes, images)
    assert all(len(set(batch)) == classes for batch in kinds.tolist())


def test_class_balanced_leaves_a_third_of_cifar_100_out_of_an_epoch() -> None:
    """A batch of 64 x 2 shows an image with probability 64/100 * 2/500; 1 - (1 - that)^390 = 63.2 %."""
    drawn = order.class_balanced(0, 0, _CIFAR_100, 50_000 // 128, 64, 2)
    assert len(np.unique(drawn)) / 50_000 == pytest.approx(1 - (1 - 0.64 * 2 / 500) ** 390, abs=0.005)
    _, counts = np.unique(_CIFAR_100[drawn[:, ::2]], return_counts=True)
    assert np.abs(counts - 390 * 0.64).max() < 5 * np.sqrt(390 * 0.64 * 0.36)


def test_every_choice_of_images_is_equally_likely() -> None:
    labels = np.zeros(5, np.int64)
    drawn = order.class_balanced(0, 0, labels, 12_000, 1, 3)
    chosen, counts = np.unique(drawn, axis=0, return_counts=True)
    assert len(chosen) == 5 * 4 * 3
    assert np.abs(counts - 200).max() < 5 * np.sqrt(200)


@pytest.mark.parametrize(("sizes", "classes", "images"), [*_SHAPES, ((500,) * 100, 64, 2)])
def test_class_tuples_visit_what_fills_whole_tuples_and_batches(
    sizes: tuple[int, ...], classes: int, images: int
) -> None:
    labels, tuples = _labels(*sizes), np.array(sizes) // images
    batches = order.class_tuples(3, 1, labels, classes, images)
    assert len(np.unique(batches)) == batches.size
    assert len(batches) == tuples.sum() // classes == order.class_tuples_steps(labels, classes, images)
    kinds = _assert_tuples(labels, batches, classes, images)
    each = np.stack([np.bincount(batch, minlength=len(sizes)) for batch in kinds])
    kept = each.sum(axis=0)
    assert 0 <= (tuples - kept).sum() < classes
    assert (kept <= tuples).all()
    if (kept > len(batches)).any():
        assert (kept >= np.minimum(tuples, len(batches))).all(), "left out first where a class comes twice in a batch"
    assert (each.min(axis=0) >= kept // len(batches)).all()
    assert (each.max(axis=0) <= -(-kept // len(batches))).all()


def test_class_tuples_of_cifar_100_leave_out_40_pairs_and_never_repeat_a_class() -> None:
    batches = order.class_tuples(0, 0, _CIFAR_100, 64, 2)
    assert batches.shape == (390, 128)
    assert 50_000 - len(np.unique(batches)) == 80
    assert all(len(set(batch)) == 64 for batch in _CIFAR_100[batches[:, ::2]].tolist())


def test_class_tuples_leave_out_and_bring_together_by_chance() -> None:
    labels, epochs = np.repeat(np.arange(6), 7), 600
    drawn = [order.class_tuples(5, epoch, labels, 4, 2) for epoch in range(epochs)]
    assert len({batches.tobytes() for batches in drawn}) == epochs
    visits = np.bincount(np.concatenate(drawn).ravel(), minlength=len(labels))
    part = 4 * 8 / 42  # of 18 pairs 16 fill 4 batches
    assert np.abs(visits - epochs * part).max() < 5 * np.sqrt(epochs * part * (1 - part))
    meet = np.zeros((6, 6))
    for batch in labels[np.concatenate(drawn)[:, ::2]]:
        meet[np.ix_(batch, batch)] += 1
    # Each batch holds 4 of 6 classes, that is 6 of 15 pairs of classes.
    expected = 4 * epochs * 6 / 15
    assert np.abs(meet[np.triu_indices(6, 1)] - expected).max() < 5 * np.sqrt(expected)


def test_golden_held_out() -> None:
    words = _words(7, 3, 0, 0, 10)
    drawn = sorted(range(10), key=words.__getitem__)
    rest, held_out = order.hold_out(7, 10, 3)
    assert held_out.tolist() == sorted(drawn[:3])
    assert rest.tolist() == sorted(drawn[3:])
    assert order.hold_out(7, 10, 0)[0].tolist() == list(range(10))


def test_each_epoch_is_another_permutation() -> None:
    seen = set()
    for seed in range(3):
        for epoch in range(4):
            permutation = order.epoch_order(seed, epoch, 1000)
            assert permutation.dtype == np.int64
            assert np.array_equal(np.sort(permutation), np.arange(1000))
            seen.add(permutation.tobytes())
    assert len(seen) == 12


def test_uniforms_are_uniform_and_differ_from_step_to_step() -> None:
    batches = [order.augmentation(0, epoch, step, 500, 4) for epoch in range(5) for step in range(5)]
    numbers = np.stack(batches)
    assert np.unique(numbers).size == numbers.size
    assert numbers.min() >= 0
    assert numbers.max() < 1
    counts = np.histogram(numbers, 20, (0, 1))[0]
    assert np.abs(counts - 2500).max() < 5 * np.sqrt(2500)


@pytest.mark.parametrize(("size", "parts"), [(10, 3), (7, 7), (3, 8), (0, 2), (50_000, 24)])
def test_parts_cover_each_row_once(size: int, parts: int) -> None:
    cut = [order.part(size, index, parts) for index in range(parts)]
    assert [row for rows in cut for row in rows] == list(range(size))
    assert max(map(len, cut)) - min(map(len, cut)) <= 1


def test_no_such_part() -> None:
    with pytest.raises(ValueError, match=r"^part 3 of 3: expected 0 <= part < parts$"):
        order.part(10, 3, 3)

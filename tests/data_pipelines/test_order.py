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

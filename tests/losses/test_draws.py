"""Random numbers by counter: Philox against its authors' known answers, and what is drawn by class."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pytest
import torch
from torch import Tensor

from losses.draws import ClassIndex, below, philox, words

KEY = 0xA4093822, 0x299F31D0


@pytest.mark.parametrize(
    ("counter", "key", "expected"),
    [
        ("00000000 00000000 00000000 00000000", "00000000 00000000", "6627e8d5 e169c58d bc57ac4c 9b00dbd8"),
        ("ffffffff ffffffff ffffffff ffffffff", "ffffffff ffffffff", "408f276d 41c83b0e a20bc7c6 6d5451fd"),
        ("243f6a88 85a308d3 13198a2e 03707344", "a4093822 299f31d0", "d16cfe09 94fdcceb 5001e420 24126ea1"),
    ],
)
def test_known_answers_of_random123(counter: str, key: str, expected: str) -> None:
    c, k, right = ([int(word, 16) for word in text.split()] for text in (counter, key, expected))
    assert [x.item() for x in philox(c, k)] == right
    assert [x.tolist() for x in philox([torch.tensor([word, word]) for word in c], k)] == [[word] * 2 for word in right]


def plain(counter: Sequence[int], key: Sequence[int]) -> list[int]:
    """Ten rounds in Python's integers."""
    c, k = list(counter), list(key)
    for _ in range(10):
        a, b = 0xD2511F53 * c[0], 0xCD9E8D57 * c[2]
        c = [b // 2**32 ^ c[1] ^ k[0], b % 2**32, a // 2**32 ^ c[3] ^ k[1], a % 2**32]
        k = [(k[0] + 0x9E3779B9) % 2**32, (k[1] + 0xBB67AE85) % 2**32]
    return c


def test_philox_of_any_counter() -> None:
    counters = np.random.default_rng(0).integers(2**32, size=(50, 4))
    found = torch.stack(philox(list(torch.tensor(counters).T), KEY), 1)
    assert found.tolist() == [plain(c, KEY) for c in counters.tolist()]


def test_words_are_a_function_of_sample_step_and_stream() -> None:
    """The words of a sample are those of counters (0, sample, step, stream), (1, sample, step, stream) ..."""
    ids = torch.tensor([7, 2**32 - 1, 0, 12345])
    found = words(KEY, 3, 11, ids, 6)
    assert found.tolist() == [(plain([0, i, 11, 3], KEY) + plain([1, i, 11, 3], KEY))[:6] for i in ids.tolist()]
    assert words(KEY, 3, 11, ids.flip(0), 6).tolist() == found.flip(0).tolist()
    assert words(KEY, 3, 11, ids[2:3], 6).tolist() == found[2:3].tolist()
    assert words(KEY, 3, 11, ids, 2).tolist() == found[:, :2].tolist()
    others = [words(KEY, 4, 11, ids, 6), words(KEY, 3, 12, ids, 6), words((1, 2), 3, 11, ids, 6)]
    assert all(not (other == found).any() for other in others)


@pytest.mark.parametrize("limit", [1, 3, 1000, 2**31 - 1])
def test_below(limit: int) -> None:
    drawn = torch.tensor([0, 1, 2**31, 2**32 - 1, 123456789])
    assert below(drawn, limit).tolist() == [w * limit // 2**32 for w in drawn.tolist()]
    assert below(drawn, torch.full((5,), limit)).tolist() == below(drawn, limit).tolist()


# -- by class ---------------------------------------------------------------------------------------------------------

CLASSES = torch.tensor([2, 0, -1, 1, 2, 0, 2, -1, 2, 1, 0, 2, 4, 4, -1, 0])
"""Unsorted, three images held out, none of class 3."""
ROWS = 20_000


def members(c: int) -> list[int]:
    return [i for i, x in enumerate(CLASSES.tolist()) if x == c]


def drawn(count: int, stream: int = 1) -> Tensor:
    return words(KEY, stream, 0, torch.arange(ROWS), count)


def assert_uniform(found: Tensor, over: Sequence[int]) -> None:
    """Chi-square with k - 1 degrees of freedom: 6 standard deviations above its mean. The key is fixed."""
    counts = np.bincount(found.flatten().numpy(), minlength=len(CLASSES))
    assert set(np.flatnonzero(counts)) == set(over)
    share, freedom = found.numel() / len(over), len(over) - 1
    chi_square = ((counts[list(over)] - share) ** 2 / share).sum()
    assert chi_square < freedom + 6 * (2 * freedom) ** 0.5 + 1e-9


@pytest.mark.parametrize("c", [0, 1, 2, 4])
@pytest.mark.parametrize("positives", [1, 2])
def test_mates(c: int, positives: int) -> None:
    index = ClassIndex(CLASSES, positives)
    found = index.mates(drawn(positives), torch.full((ROWS,), c))
    assert found.shape == (ROWS, positives)
    for column in found.T:
        assert_uniform(column, members(c))
    assert all(len(set(row)) == positives for row in found[:500].tolist())


def test_mates_are_any_of_the_arrangements() -> None:
    """Three of five without replacement: each of the 60 ordered triples as often."""
    index = ClassIndex(CLASSES, 2)
    found = index.mates(drawn(3), torch.full((ROWS,), 2))
    triples, counts = np.unique(found.numpy(), axis=0, return_counts=True)
    assert len(triples) == 60
    assert all(len(set(triple)) == 3 for triple in triples.tolist())
    share = ROWS / 60
    assert ((counts - share) ** 2 / share).sum() < 59 + 6 * (2 * 59) ** 0.5


def test_all_of_a_class_can_be_drawn() -> None:
    found = ClassIndex(CLASSES, 2).mates(drawn(5)[:300], torch.full((300,), 2))
    assert all(sorted(row) == members(2) for row in found.tolist())


@pytest.mark.parametrize("c", [0, 1, 2, 4])
def test_others(c: int) -> None:
    found = ClassIndex(CLASSES, 1).others(drawn(3), torch.full((ROWS,), c))
    assert found.shape == (ROWS, 3)
    assert_uniform(found, [i for i, x in enumerate(CLASSES.tolist()) if x not in (c, -1)])


def test_anyone() -> None:
    assert_uniform(ClassIndex(CLASSES, 1).anyone(drawn(2)), [i for i, x in enumerate(CLASSES.tolist()) if x >= 0])


def test_rows_of_several_classes() -> None:
    """Each row has what it would have alone."""
    index, targets = ClassIndex(CLASSES, 2), torch.tensor([2, 0, 4, 1, 2, 2])
    w = drawn(4)[:6]
    mates, others = index.mates(w[:, :2], targets), index.others(w[:, 2:], targets)
    for n in range(6):
        assert torch.equal(mates[n : n + 1], index.mates(w[n : n + 1, :2], targets[n : n + 1]))
        assert torch.equal(others[n : n + 1], index.others(w[n : n + 1, 2:], targets[n : n + 1]))


def test_lowest_and_highest_words() -> None:
    """Nothing is drawn from beyond the ends of a class."""
    index = ClassIndex(CLASSES, 2)
    ends = torch.tensor([[0] * 4, [2**32 - 1] * 4])
    for c in (0, 1, 2, 4):
        targets = torch.tensor([c, c])
        assert set(index.mates(ends[:, :2], targets).flatten().tolist()) <= set(members(c))
        assert (CLASSES[index.others(ends, targets)] >= 0).all()
        assert (CLASSES[index.others(ends, targets)] != c).all()


def test_classes_too_small_are_refused() -> None:
    with pytest.raises(ValueError, match=r"^class 1 has 2 training samples, positives = 3 needs as many to draw from$"):
        ClassIndex(CLASSES, 3)
    ClassIndex(CLASSES, 2)
    with pytest.raises(ValueError, match=r"^all 2 training samples are of class 1: there are no negatives to draw$"):
        ClassIndex(torch.tensor([1, -1, 1]), 1)


def test_nothing_of_the_index_is_saved() -> None:
    assert not ClassIndex(CLASSES, 1).state_dict()

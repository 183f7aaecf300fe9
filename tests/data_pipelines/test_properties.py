"""Promise 2 for any size, batch, number of ranks, sampler, epoch and place to go on from: by ids, bad samples too."""

import io
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from data_pipelines import DataConfig, DataError, order
from data_pipelines.damage import Damage, UnreadableError
from data_pipelines.sampling import Sampling
from data_pipelines.sources.contract import Source
from data_pipelines.sources.reading import Reader

_FEW = settings(max_examples=60, deadline=None, derandomize=True)


def _png() -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (2, 3)).save(buffer, "PNG")
    return buffer.getvalue()


_PNG = _png()


class _Held(Source):
    """Samples that lie nowhere; some cannot be read."""

    def __init__(self, labels: np.ndarray, bad: set[int]) -> None:
        self.labels, self._bad = labels, bad
        self.classes = tuple(str(k) for k in range(int(labels.max()) + 1))

    def read(self, index: int) -> bytes:
        if index in self._bad:
            raise UnreadableError("bad")
        return _PNG

    def place(self, index: int) -> str:
        return str(index)

    def place_of_class(self, label: int) -> str:
        return self.classes[label]

    def digest(self) -> str:
        return ""


@st.composite
def _cases(draw: st.DrawFn) -> dict[str, Any]:
    counts = draw(st.lists(st.integers(4, 30), min_size=1, max_size=6))
    labels = np.repeat(np.arange(len(counts)), counts)
    np.random.Generator(np.random.Philox(draw(st.integers(0, 99)))).shuffle(labels)
    sampler = draw(st.sampled_from(["shuffle", "class_balanced", "class_tuples"]))
    tuples = draw(st.integers(1, len(counts) if sampler != "shuffle" else 9))
    return {
        "labels": labels,
        "sampler": sampler,
        "batch": tuples * (1 if sampler == "shuffle" else 2),
        "held_out": draw(st.sampled_from([0.0, 0.2])),
        "fraction": draw(st.sampled_from([1.0, 0.8])),
        "seed": draw(st.integers(0, 2**64 - 1)),
        "epoch": draw(st.integers(0, 1000)),
        "ranks": draw(st.integers(1, 5)),
        "bad": draw(st.sets(st.integers(0, len(labels) - 1), max_size=4)),
        "resume": draw(st.floats(0, 1)),
    }


def _sampling(case: dict[str, Any]) -> Sampling | None:
    keys = ("sampler", "held_out", "fraction")
    config = DataConfig(
        dataset="image_folder", root="/", global_batch=case["batch"], **{key: case[key] for key in keys}
    )
    names = tuple(str(k) for k in range(int(case["labels"].max()) + 1))
    try:
        return Sampling(config, case["seed"], case["labels"], names)
    except DataError:  # A class has fewer than two that are trained on.
        return None


@_FEW
@given(_cases())
def test_an_epoch_shows_each_sample_once_up_to_the_remainder(case: dict[str, Any]) -> None:
    sampling = _sampling(case)
    if sampling is None:
        return
    drawn, labels = sampling.epoch(case["epoch"], sampling.steps), case["labels"]
    assert drawn.shape == (sampling.steps, case["batch"])
    trained_on = set(sampling.trained_on.tolist())
    assert set(drawn.ravel().tolist()) <= trained_on
    assert not trained_on & set(sampling.held_out.tolist())
    kept = order.fraction_sizes(np.bincount(labels), case["fraction"])
    assert len(trained_on) + len(sampling.held_out) == kept.sum()
    if case["sampler"] == "class_balanced":
        return
    assert len(np.unique(drawn)) == drawn.size
    counts = np.bincount(labels[sampling.trained_on])
    tuples = len(trained_on) if case["sampler"] == "shuffle" else int((counts // 2).sum())
    odd = 0 if case["sampler"] == "shuffle" else int((counts % 2).sum())
    size = 1 if case["sampler"] == "shuffle" else 2
    assert len(trained_on) - drawn.size == odd + tuples % (case["batch"] // size) * size


@_FEW
@given(_cases())
def test_ranks_and_places_to_go_on_from_show_the_same_with_bad_samples_among_them(case: dict[str, Any]) -> None:
    sampling = _sampling(case)
    if sampling is None:
        return
    labels, among = case["labels"], sampling.trained_on
    drawn, first = sampling.epoch(case["epoch"], sampling.steps), int(case["resume"] * sampling.steps)
    good = {label: [i for i in among.tolist() if labels[i] == label and i not in case["bad"]] for label in set(labels)}
    if not all(good.values()):
        return

    def shown(wanted: int) -> int:
        """The sample, or the next of its class, the last one's next being the first."""
        kin = good[labels[wanted]]
        return wanted if wanted not in case["bad"] else next((i for i in kin if i > wanted), kin[0])

    for step in range(first, sampling.steps):
        seen = []
        for rank in range(case["ranks"]):
            part = order.part(case["batch"], rank, case["ranks"])
            reader = Reader(_Held(labels, case["bad"]), "train", Damage("replace", 1.0, {"train": len(labels)}))
            wanted = drawn[step, part.start : part.stop]
            seen += reader.read(wanted, among, np.ones(len(wanted), bool)).ids.tolist()
        assert seen == [shown(int(i)) for i in drawn[step]]


@_FEW
@given(_cases(), st.integers(1, 12))
def test_evaluation_counts_each_sample_once(case: dict[str, Any], batch: int) -> None:
    size, seen, wrong = len(case["labels"]), [], set()
    for rank in range(case["ranks"]):
        reader = Reader(_Held(case["labels"], case["bad"]), "val", Damage("replace", 1.0, {"val": size}))
        part = order.part(size, rank, case["ranks"])
        for begin in range(part.start, part.stop, batch):
            ids = np.arange(begin, min(begin + batch, part.stop))
            read = reader.read_as_they_are(ids, np.ones(len(ids), bool))
            seen += read.ids.tolist()
            wrong |= set(read.ids[~read.readable].tolist())
    assert seen == list(range(size))
    assert wrong == case["bad"]


@_FEW
@given(_cases(), st.floats(0.01, 1), st.floats(0.01, 1))
def test_a_smaller_part_lies_within_a_larger_one(case: dict[str, Any], one: float, other: float) -> None:
    labels = case["labels"]
    small, large = (order.fraction(case["seed"], labels, part) for part in sorted((one, other)))
    assert set(small.tolist()) <= set(large.tolist())
    wanted = [max(1, int(min(one, other) * n + 0.5)) for n in np.bincount(labels)]
    assert np.bincount(labels[small], minlength=len(wanted)).tolist() == wanted


def test_the_numbers_of_a_part_never_change() -> None:
    """The samples of a class with the lowest words of the stream of this purpose, number 20."""
    words = np.random.Philox(key=np.array([7, 20], np.uint64), counter=np.zeros(4, np.uint64)).random_raw(16)
    expected = [*np.argsort(words[:8])[:2], *(8 + np.argsort(words[8:])[:2])]
    assert order.fraction(7, np.repeat([0, 1], 8), 0.25).tolist() == sorted(expected)


@pytest.mark.parametrize(("part", "message"), [(0.0, "greater than 0"), (1.5, "less than or equal to 1")])
def test_parts_that_are_none(part: float, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        DataConfig(dataset="fashion_mnist_subset", global_batch=4, fraction=part)

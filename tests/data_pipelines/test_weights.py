"""Weights of classes: what they are, what becomes of a loss, and mistakes."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from data_pipelines import DataConfig, DataError, check_files, open_pipeline
from data_pipelines.weights import class_weights
from losses.functional import binary_cross_entropy, cross_entropy

_NAMES = ("cow", "ice cream", "empty")
_LABELS = np.array([0] * 6 + [1] * 2)


def test_balanced_and_given_weights() -> None:
    # N / (K n_c) = 8 / (2 * 6) and 8 / (2 * 2); the mean over images is (6 * 2/3 + 2 * 2) / 8 = 1.
    assert class_weights("balanced", _LABELS, _NAMES).tolist() == pytest.approx([2 / 3, 2, 1])
    # 1, 3, 9 with a mean of (6 + 6) / 8 = 3/2.
    assert class_weights([1.0, 3.0, 9.0], _LABELS, _NAMES).tolist() == pytest.approx([2 / 3, 2, 6])


@pytest.mark.parametrize("text", ["ice cream 3\nempty 9\n\ncow 1e0\n", "1\n3\n9\n"])
def test_weights_from_a_file(tmp_path: Path, text: str) -> None:
    (tmp_path / "weights").write_text(text)
    assert class_weights(tmp_path / "weights", _LABELS, _NAMES).tolist() == pytest.approx([2 / 3, 2, 6])


@pytest.mark.parametrize(
    ("weights", "message"),
    [
        ([1.0, 2.0], "class_weights: expected a weight for each of 10 classes, found 2"),
        ([1.0] * 9 + [0.0], "class_weights: expected numbers above 0, found 0 for class 'Ankle boot'"),
        ("cow 1", "class_weights: {path} has no line for class 'T-shirt/top'"),
        ("cow one", "class_weights: {path}: expected lines of a weight, or of a class and its weight"),
        (None, "class_weights: {path}: cannot be read: [Errno 2] No such file or directory: '{path}'"),
    ],
)
def test_mistakes_are_found_beforehand(tmp_path: Path, weights: Any, message: str) -> None:
    path = tmp_path / "weights"
    if isinstance(weights, str):
        path.write_text(weights)
    given = weights if isinstance(weights, list) else str(path)
    with pytest.raises(DataError) as caught:
        check_files(DataConfig(dataset="fashion_mnist_subset", global_batch=4, class_weights=given))
    assert str(caught.value) == message.format(path=path)


def test_of_what_is_trained_on() -> None:
    config = DataConfig(dataset="fashion_mnist_subset", global_batch=4, fraction=0.01, class_weights="balanced")
    sizes = check_files(config)
    pipeline = open_pipeline(config, 3, torch.device("cpu"))
    assert pipeline.class_weights is not None
    assert pipeline.class_weights.dtype == np.float32
    counts = np.bincount(pipeline.train_targets[pipeline.train_targets >= 0], minlength=10)
    assert counts.sum() == pipeline.train_size == sizes.trained_on
    assert (pipeline.class_weights * counts).tolist() == pytest.approx([counts.sum() / 10] * 10)


def test_losses() -> None:
    torch.manual_seed(0)
    logits, weight = torch.randn(5, 3), torch.tensor([0.5, 1.0, 2.0])
    hard, soft = torch.tensor([0, 2, 2, 1, 0]), torch.rand(5, 3).softmax(1)
    logs = logits.double().log_softmax(1)
    for targets, wanted in ((hard, F.one_hot(hard, 3).double()), (soft, soft.double())):
        expected = -(weight.double() * wanted * logs).sum(1).mean()
        assert cross_entropy(logits, targets, weight=weight).item() == pytest.approx(expected.item(), rel=1e-6)
        rows = (wanted * weight).sum(1)
        each = F.binary_cross_entropy_with_logits(logits.double(), wanted, reduction="none")
        found = binary_cross_entropy(logits, targets, weight=weight)
        assert found.item() == pytest.approx((rows * each.mean(1)).mean().item(), rel=1e-6)
        found = binary_cross_entropy(logits, targets, weight=weight, sum_classes=True)
        assert found.item() == pytest.approx((rows * each.sum(1)).mean().item(), rel=1e-6)
    assert cross_entropy(logits, soft, weight=weight) == pytest.approx(F.cross_entropy(logits, soft, weight=weight))

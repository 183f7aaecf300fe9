"""Resident data: augmentation against a slow reference, and rows that do not depend on who asks."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from data_pipelines import DataConfig, DataError, Pipeline, open_pipeline, order
from data_pipelines.pixels import Normalise
from data_pipelines.resident import augment
from data_pipelines.sources.standard_sets import STANDARD
from tests.data_pipelines import cutting
from tests.data_pipelines.files import write_fashion

_CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def fashion(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("fashion")
    write_fashion(root, train=61, test=23)
    return root


def _open(root: Path, **options: Any) -> Pipeline:
    config = DataConfig(dataset="fashion_mnist", root=root, **{"global_batch": 10} | options)
    return open_pipeline(config, seed=5, device=_CPU)


@pytest.fixture
def pipeline(fashion: Path) -> Iterator[Pipeline]:
    opened = _open(fashion)
    yield opened
    opened.close()


def test_a_batch_is_as_promised(pipeline: Pipeline, fashion: Path) -> None:
    cutting.assert_a_batch_is_as_promised(pipeline, STANDARD["fashion_mnist"].read(fashion)[0].labels)


def test_rows_do_not_depend_on_the_cut(pipeline: Pipeline) -> None:
    cutting.assert_rows_do_not_depend_on_the_cut(pipeline)


def test_a_view_is_the_same_in_any_company(pipeline: Pipeline, fashion: Path) -> None:
    cutting.assert_a_view_is_the_same_in_any_company(pipeline)
    per_peer = _open(fashion, views="per_peer")
    assert all(
        cutting.same(a, b)
        for a, b in zip(per_peer.train(1, 0, slice(0, 9)), pipeline.train(1, 0, slice(0, 9)), strict=True)
    )


def test_what_is_held_out_is_never_trained_on(fashion: Path) -> None:
    split = STANDARD["fashion_mnist"].read(fashion)[0]
    pipeline = _open(fashion, held_out=0.2, mean=[0.0], std=[1 / 255])
    cutting.assert_what_is_held_out_is_never_trained_on(pipeline, 12, split.labels)
    (batch,) = pipeline.held_out(0, 1, 12)
    shown = batch.images.permute(0, 2, 3, 1).numpy()
    np.testing.assert_allclose(shown, split.images[batch.ids.numpy()], atol=1e-4)


def test_too_little_is_left_or_held_out(fashion: Path) -> None:
    for part, message in (
        (
            0.9,
            f"global_batch: expected at most the 7 training samples of {fashion} that held_out = 0.9 leaves, found 10",
        ),
        (0.01, "held_out: 0.01 of 61 training samples is less than one of them"),
    ):
        with pytest.raises(DataError) as caught:
            _open(fashion, held_out=part)
        assert str(caught.value) == message


def test_views_follow_their_own_random_numbers(fashion: Path) -> None:
    pipeline = _open(fashion, mean=[0.25], std=[0.5])
    images = STANDARD["fashion_mnist"].read(fashion)[0].images
    for step, batch in enumerate(pipeline.train(4, 0, slice(0, 10), (3, 1))):
        for pixels, view in zip(batch.views, (3, 1), strict=True):
            uniforms = order.augmentation(5, 4, step, 10, 3, view)
            for row, index in enumerate(batch.ids.tolist()):
                expected = _reference(images[index], uniforms[row], 4, "reflect", True).astype(np.float64)
                actual = pixels[row].permute(1, 2, 0).numpy()
                np.testing.assert_allclose(actual, (expected / 255 - 0.25) / 0.5, atol=1e-6)


def test_an_epoch_can_begin_anywhere(pipeline: Pipeline) -> None:
    cutting.assert_an_epoch_can_begin_anywhere(pipeline)


def test_an_epoch_shows_no_sample_twice(pipeline: Pipeline) -> None:
    cutting.assert_an_epoch_shows_no_sample_twice(pipeline)


@pytest.mark.parametrize("sampler", ["class_balanced", "class_tuples"])
def test_batches_of_classes(fashion: Path, sampler: str) -> None:
    labels = STANDARD["fashion_mnist"].read(fashion)[0].labels
    for options in ({}, {"held_out": 0.2}, {"images_per_class": 5, "views": "per_peer"}):
        pipeline = _open(fashion, sampler=sampler, **options)
        cutting.assert_batches_are_made_of_classes(pipeline, options.get("images_per_class", 2))
        cutting.assert_rows_do_not_depend_on_the_cut(pipeline)
        cutting.assert_an_epoch_can_begin_anywhere(pipeline)
        cutting.assert_a_batch_is_as_promised(pipeline, labels)
    cutting.assert_what_is_held_out_is_never_trained_on(_open(fashion, sampler=sampler, held_out=0.2), 12, labels)


def test_steps_of_batches_of_classes(fashion: Path) -> None:
    """Of 61 images 10 classes have 6 each and one of these one more: 30 pairs, or 10 tuples of 5."""
    assert _open(fashion, sampler="class_balanced", images_per_class=5).steps_per_epoch == 6
    for images, steps in ((2, 6), (5, 5)):
        pipeline = _open(fashion, sampler="class_tuples", images_per_class=images)
        assert pipeline.steps_per_epoch == steps
        cutting.assert_an_epoch_shows_no_sample_twice(pipeline)


@pytest.mark.parametrize("sampler", ["class_balanced", "class_tuples"])
def test_too_few_images_or_classes_for_batches_of_classes(fashion: Path, sampler: str) -> None:
    for options, message in (
        (
            {"images_per_class": 10},
            "images_per_class: 10 are more than the 6 training samples of class 'Trouser'; expected at most 6",
        ),
        (
            {"held_out": 0.8},
            "images_per_class: 2 are more than the 0 training samples of class 'Sneaker' that held_out = 0.8 leaves; "
            "expected sampler = shuffle",
        ),
        (
            {"global_batch": 22},
            f"global_batch: expected at most 20 for sampler {sampler}, images_per_class = 2 for each of 10 classes, "
            "found 22",
        ),
    ):
        with pytest.raises(DataError) as caught:
            _open(fashion, sampler=sampler, **options)
        assert str(caught.value) == message


def test_each_validation_row_comes_once(pipeline: Pipeline) -> None:
    cutting.assert_each_validation_row_comes_once(pipeline)


@pytest.mark.parametrize("padding_mode", ["reflect", "zeros"])
@pytest.mark.parametrize("padding", [0, 1, 4])
@pytest.mark.parametrize("flip", [True, False])
def test_training_images_against_a_slow_reference(fashion: Path, padding_mode: str, padding: int, flip: bool) -> None:
    augmentation = {"padding": padding, "padding_mode": padding_mode, "flip": flip}
    pipeline = _open(fashion, augmentation=augmentation, mean=[0.25], std=[0.5])
    images = STANDARD["fashion_mnist"].read(fashion)[0].images
    for step, batch in enumerate(pipeline.train(4, 0, slice(0, 10))):
        uniforms = order.augmentation(5, 4, step, 10, 3)
        assert batch.ids.tolist() == order.epoch_order(5, 4, 61)[step * 10 : step * 10 + 10].tolist()
        for row, index in enumerate(batch.ids.tolist()):
            expected = _reference(images[index], uniforms[row], padding, padding_mode, flip).astype(np.float64)
            actual = batch.images[row].permute(1, 2, 0).numpy()
            np.testing.assert_allclose(actual, (expected / 255 - 0.25) / 0.5, atol=1e-6)


def _reference(image: np.ndarray, uniforms: np.ndarray, padding: int, padding_mode: str, flip: bool) -> np.ndarray:
    mode: Any = "reflect" if padding_mode == "reflect" else "constant"
    padded = np.pad(image, ((padding, padding), (padding, padding), (0, 0)), mode=mode)
    top, left = (int(uniform * (2 * padding + 1)) for uniform in uniforms[:2])
    crop = padded[top : top + len(image), left : left + len(image)]
    return crop[:, ::-1] if flip and uniforms[2] < 0.5 else crop


@pytest.mark.parametrize("padding_mode", ["reflect", "zeros"])
def test_every_shift_of_a_coloured_oblong_image(padding_mode: str) -> None:
    images = np.random.default_rng(1).integers(0, 256, (3, 9, 7, 3), np.uint8)
    shifts = [(top, left, flip) for top in range(11) for left in range(11) for flip in (False, True)]
    ids = torch.arange(len(shifts)) % 3
    top, left, flip = (torch.tensor(column) for column in zip(*shifts, strict=True))
    actual = augment(torch.from_numpy(images), ids, top, left, flip, 5, padding_mode)
    assert actual.is_contiguous()
    mode: Any = "reflect" if padding_mode == "reflect" else "constant"
    for row, (y, x, mirrored) in enumerate(shifts):
        crop = np.pad(images[row % 3], ((5, 5), (5, 5), (0, 0)), mode=mode)[y : y + 9, x : x + 7]
        assert np.array_equal(actual[row].numpy(), crop[:, ::-1] if mirrored else crop)


def test_shifts_and_flips_are_all_equally_likely(fashion: Path) -> None:
    rows = np.concatenate([order.augmentation(0, 0, step, 1000, 3) for step in range(50)])
    for column in (0, 1):
        counts = np.bincount((rows[:, column] * 9).astype(int), minlength=9)
        assert np.abs(counts - 50_000 / 9).max() < 5 * np.sqrt(50_000 / 9)
    assert abs((rows[:, 2] < 0.5).mean() - 0.5) < 0.01


def test_validation_images_are_not_augmented(fashion: Path) -> None:
    pipeline = _open(fashion)
    (batch,) = pipeline.evaluate(1, 2, 100)
    images, labels = (getattr(STANDARD["fashion_mnist"].read(fashion)[1], key)[11:] for key in ("images", "labels"))
    np.testing.assert_allclose(batch.images.permute(0, 2, 3, 1).numpy(), (images / 255 - 0.2860) / 0.3530, atol=1e-6)
    assert batch.targets.tolist() == labels.tolist()


@pytest.mark.parametrize("side", [14, 32])
def test_images_are_scaled_as_by_pil(fashion: Path, side: int) -> None:
    pipeline = _open(fashion, scale_to=side, mean=[0.0], std=[1 / 255], augmentation={"padding": 0, "flip": False})
    assert pipeline.image_size == side
    train, test = STANDARD["fashion_mnist"].read(fashion)
    (batch,) = pipeline.evaluate(0, 1, 100)
    (first, *_) = pipeline.train(0, 0, slice(0, 10))
    for split, shown, ids in ((test, batch.images, batch.ids), (train, first.images, first.ids)):
        assert shown.shape == (len(ids), 1, side, side)
        for image, i in zip(shown, ids, strict=True):
            expected = Image.fromarray(split.images[i, ..., 0]).resize((side, side), Image.Resampling.BILINEAR)
            assert (image[0] - torch.from_numpy(np.array(expected, np.float32))).abs().max() <= 1


def test_normalise_against_its_definition() -> None:
    pixels = torch.randint(0, 256, (5, 6, 4, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    mean, std = torch.tensor([0.1, 0.5, 0.9]), torch.tensor([0.2, 0.3, 0.4])
    normalise = Normalise(mean.tolist(), std.tolist(), 4, _CPU)
    expected = ((pixels / 255 - mean) / std).permute(0, 3, 1, 2)
    torch.testing.assert_close(normalise(pixels), expected)
    assert normalise(pixels).is_contiguous(memory_format=torch.channels_last)
    assert torch.equal(torch.cat([normalise(part) for part in pixels.split([1, 3, 1])]), normalise(pixels))


@pytest.mark.gpu
def test_cuda_gives_the_same_bits(fashion: Path) -> None:
    config = DataConfig(dataset="fashion_mnist", root=fashion, global_batch=10)
    pipelines = [open_pipeline(config, 5, device) for device in (_CPU, torch.device("cuda"))]
    for a, b in zip(*(pipeline.train(0, 0, slice(2, 9)) for pipeline in pipelines), strict=True):
        assert b.images.is_cuda
        assert cutting.same(a, type(b)(b.images.cpu(), b.targets.cpu(), b.ids.cpu()))

"""Photos through DALI: pixels against PIL and torchvision, rows that do not depend on who asks, and broken files."""

import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision import transforms

from data_pipelines import DataConfig, DataError, Pipeline, check_files, open_pipeline, order
from data_pipelines.decoding import windows
from data_pipelines.sources.opening import open_photos
from data_pipelines.sources.sections import Where
from tests.data_pipelines import cutting
from tests.data_pipelines.files import write_photos

pytest.importorskip("nvidia.dali")

_CPU = torch.device("cpu")
_RAW: dict[str, Any] = {"mean": [0.0] * 3, "std": [1 / 255] * 3}  # gives back the bytes as they were


def _config(root: Path, **options: Any) -> DataConfig:
    values = {"global_batch": 8, "image": {"size": 48, "resize": 56}, "decoding": {"threads": 2}} | options
    return DataConfig(dataset="image_folder", root=root, **values)


def _open(root: Path, **options: Any) -> Pipeline:
    return open_pipeline(_config(root, **options), seed=5, device=_CPU)


@pytest.fixture
def pipeline(photos: Path) -> Iterator[Pipeline]:
    opened = _open(photos)
    yield opened
    opened.close()


def test_what_is_known_of_the_folder(pipeline: Pipeline) -> None:
    assert (pipeline.train_size, pipeline.eval_size, pipeline.num_classes, pipeline.channels) == (27, 15, 3, 3)
    assert pipeline.class_names == ("n000", "n001", "n002")
    assert pipeline.steps_per_epoch == 3


def test_a_batch_is_as_promised(pipeline: Pipeline) -> None:
    cutting.assert_a_batch_is_as_promised(pipeline, np.repeat([0, 1, 2], 9))


def test_the_next_epoch_goes_on_with_the_graph_of_the_one_before(photos: Path, pipeline: Pipeline) -> None:
    other = _open(photos)
    list(pipeline.train(0, 0, slice(0, 8)))
    [built] = pipeline._idle.values()  # type: ignore[attr-defined]
    second, paused = list(pipeline.train(1, 0, slice(0, 8))), pipeline.train(2, 0, slice(0, 8))
    assert list(pipeline._idle.values()) == [built]  # type: ignore[attr-defined]
    next(paused)
    beside = list(pipeline.train(1, 0, slice(0, 8)))  # while another pass has the graph
    for mine, again, expected in zip(second, beside, other.train(1, 0, slice(0, 8)), strict=True):
        assert torch.equal(mine.images, expected.images)
        assert torch.equal(again.images, expected.images)
    other.close()


def test_rows_do_not_depend_on_the_cut(pipeline: Pipeline) -> None:
    cutting.assert_rows_do_not_depend_on_the_cut(pipeline)


@pytest.mark.parametrize("views", ["shared", "per_peer"])
def test_a_view_is_the_same_in_any_company(photos: Path, views: str) -> None:
    pipeline = _open(photos, views=views)
    cutting.assert_a_view_is_the_same_in_any_company(pipeline)
    pipeline.close()


def test_photos_decoded_whole_keep_their_rows_and_can_be_broken(photos: Path, tmp_path: Path) -> None:
    pipeline = _open(photos, views="per_peer")
    cutting.assert_rows_do_not_depend_on_the_cut(pipeline)
    pipeline.close()
    copied = Path(shutil.copytree(photos, tmp_path / "photos"))
    for path in (copied / "train").rglob("*.JPEG"):
        path.write_bytes(path.read_bytes()[:1500])
    broken = _open(copied, views="per_peer", on_error="raise")
    with pytest.raises(DataError, match="found 1500 bytes of a JPEG file that was cut short"):
        list(broken.train(0, 0, slice(0, 8), (0, 1)))
    broken.close()


def test_what_is_held_out_is_never_trained_on(photos: Path) -> None:
    pipeline = _open(photos, held_out=0.3)
    cutting.assert_what_is_held_out_is_never_trained_on(pipeline, 8, np.repeat([0, 1, 2], 9))
    pipeline.close()


def test_rows_do_not_depend_on_the_threads(photos: Path, pipeline: Pipeline) -> None:
    for threads in (1, 5):
        other = _open(photos, decoding={"threads": threads})
        for a, b in zip(pipeline.train(0, 0, slice(0, 8)), other.train(0, 0, slice(0, 8)), strict=True):
            assert cutting.same(a, b)
        other.close()


def test_an_epoch_can_begin_anywhere(pipeline: Pipeline) -> None:
    cutting.assert_an_epoch_can_begin_anywhere(pipeline)


def test_an_epoch_shows_no_sample_twice(pipeline: Pipeline) -> None:
    cutting.assert_an_epoch_shows_no_sample_twice(pipeline)


@pytest.mark.parametrize("sampler", ["class_balanced", "class_tuples"])
def test_batches_of_classes(photos: Path, sampler: str) -> None:
    pipeline = _open(photos, sampler=sampler, global_batch=6)
    cutting.assert_batches_are_made_of_classes(pipeline, 2)
    cutting.assert_rows_do_not_depend_on_the_cut(pipeline)
    cutting.assert_an_epoch_can_begin_anywhere(pipeline)
    pipeline.close()
    pipeline = _open(photos, sampler=sampler, global_batch=6, held_out=0.3)
    cutting.assert_what_is_held_out_is_never_trained_on(pipeline, 8, np.repeat([0, 1, 2], 9))
    pipeline.close()


def test_more_tuples_than_classes(photos: Path) -> None:
    with pytest.raises(DataError) as caught:
        check_files(_config(photos, sampler="class_tuples"))
    assert str(caught.value) == (
        "global_batch: expected at most 6 for sampler class_tuples, images_per_class = 2 for each of 3 classes, found 8"
    )


def test_each_validation_row_comes_once(pipeline: Pipeline) -> None:
    cutting.assert_each_validation_row_comes_once(pipeline)


def test_training_pauses_for_an_evaluation_and_may_be_left(pipeline: Pipeline) -> None:
    whole = list(pipeline.train(0, 0, slice(0, 8)))
    training = iter(pipeline.train(0, 0, slice(0, 8)))
    assert cutting.same(next(training), whole[0])
    assert sum(len(batch.ids) for batch in pipeline.evaluate(0, 1, 4)) == 15
    assert cutting.same(next(training), whole[1])
    del training
    assert all(cutting.same(a, b) for a, b in zip(pipeline.train(0, 0, slice(0, 8)), whole, strict=True))


def test_batches_outlive_the_pipeline(photos: Path) -> None:
    pipeline = _open(photos)
    batches = list(pipeline.evaluate(0, 1, 2))
    copies = [batch.images.clone() for batch in batches]
    pipeline.close()
    assert all(torch.equal(batch.images, copy) for batch, copy in zip(batches, copies, strict=True))


def test_validation_pixels_are_torchvisions(photos: Path) -> None:
    transform = transforms.Compose([transforms.Resize(56), transforms.CenterCrop(48)])
    (batch,) = _open(photos, **_RAW).evaluate(0, 1, 15)
    listing = open_photos(Where("image_folder", photos))[1]
    for row, index in enumerate(batch.ids.tolist()):
        with Image.open(listing.place(index)) as image:
            expected = np.asarray(transform(image.convert("RGB"))).astype(int)
        difference = np.abs(batch.images[row].permute(1, 2, 0).round().numpy() - expected)
        assert difference.max() <= 1, listing.place(index)


@pytest.mark.parametrize(("views", "view"), [("shared", 0), ("per_peer", 0), ("per_peer", 2)])
def test_training_pixels_are_pils(photos: Path, views: str, view: int) -> None:
    listing = open_photos(Where("image_folder", photos))[0]
    pipeline = _open(photos, views=views, **_RAW)
    for step, batch in enumerate(pipeline.train(6, 0, slice(0, 8), (1, view))):
        uniforms = order.augmentation(5, 6, step, 8, windows.COLUMNS, view)
        draws = windows.crop_draws(uniforms, (0.08, 1.0), (3 / 4, 4 / 3))
        flips = windows.flips(draws)
        for row, index in enumerate(batch.ids.tolist()):
            with Image.open(listing.place(index)) as image:
                size = np.array([[image.height, image.width]])
                corners, shapes = windows.crop_windows(draws[row : row + 1], size, (3 / 4, 4 / 3))
                (top, left), (height, width) = corners[0].tolist(), shapes[0].tolist()
                crop = image.convert("RGB").crop((left, top, left + width, top + height))
            expected = np.asarray(crop.resize((48, 48), Image.Resampling.BILINEAR)).astype(int)
            expected = expected[:, ::-1] if flips[row] else expected
            difference = np.abs(batch.views[1][row].permute(1, 2, 0).round().numpy() - expected)
            # PIL rounds to bytes between its two passes, and a decoded window has no colour from beyond its edges,
            # which moves a few bytes by 2 or 3. A window one pixel off would give a mean above 3.
            assert difference.max() <= 5, listing.place(index)
            assert difference.mean() < 0.5, listing.place(index)


def test_the_constants_of_imagenet(photos: Path) -> None:
    (raw,) = _open(photos, **_RAW).evaluate(0, 1, 15)
    (batch,) = _open(photos).evaluate(0, 1, 15)
    normalise = transforms.Normalize((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
    torch.testing.assert_close(batch.images, normalise(raw.images / 255), atol=1e-5, rtol=1e-5)


# --- errors ---


@pytest.fixture
def copy(photos: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(photos, tmp_path / "photos"))


def _train_error(root: Path) -> str:
    pipeline = _open(root, on_error="raise")
    with pytest.raises(DataError) as caught:
        list(pipeline.train(0, 0, slice(0, 8)))
    pipeline.close()
    return str(caught.value)


def test_a_photo_cut_short(copy: Path) -> None:
    path = copy / "val/n001/00.JPEG"
    path.write_bytes(path.read_bytes()[:1500])
    pipeline = _open(copy, on_error="raise")
    with pytest.raises(DataError) as caught:
        list(pipeline.evaluate(0, 1, 4))
    assert str(caught.value) == (
        f"{path}: expected a whole image, found 1500 bytes of a JPEG file that was cut short. "
        "Fetch the file again, or take it out"
    )
    assert len(next(iter(pipeline.evaluate(0, 5, 3))).ids) == 3
    pipeline.close()


def test_a_file_that_is_no_image(copy: Path) -> None:
    for path in (copy / "train").rglob("*.JPEG"):
        path.write_text("<html>Not Found</html>")
    first = order.epoch_order(5, 0, 27)[:8]
    train, _ = open_photos(Where("image_folder", copy))
    message = _train_error(copy)
    expected = {
        f"{train.place(index)}: expected a JPEG or PNG image, found a file that is neither, or "
        "whose beginning is damaged. Fetch the file again, or take it out"
        for index in first
    }
    assert message in expected


def test_a_file_that_vanished(copy: Path) -> None:
    pipeline = _open(copy, on_error="raise")
    path = copy / "val/n000/00.JPEG"
    path.unlink()
    with pytest.raises(DataError) as caught:
        list(pipeline.evaluate(0, 1, 4))
    assert str(caught.value) == (f"{path}: expected an image, found no file. Fetch the file again, or take it out")
    pipeline.close()


def test_a_mixed_decoder_without_cuda(photos: Path) -> None:
    with pytest.raises(ValueError, match="mixed needs a CUDA device; use auto, cpu or torchvision"):
        _open(photos, decoding={"decoder": "mixed"})


def test_without_dali(photos: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "nvidia.dali", None)
    for decoder in ("cpu", "mixed"):
        with pytest.raises(DataError) as caught:
            check_files(_config(photos, decoding={"decoder": decoder}))
        assert str(caught.value) == (
            f"decoding.decoder: {decoder} needs NVIDIA DALI; expected auto or torchvision, or pip install "
            "cohort[dali-cuda13], or cohort[dali-cuda12] where the driver is for CUDA 12"
        )
    check_files(_config(photos))
    pipeline = _open(photos)
    assert next(iter(pipeline.train(0, 0, slice(0, 8)))).images.shape == (8, 3, 48, 48)
    pipeline.close()


def test_dali_is_loaded_only_for_photos() -> None:
    code = "import sys, data_pipelines; sys.exit('nvidia.dali' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


@pytest.mark.gpu
def test_mixed_decoding_is_close_to_the_cpu(tmp_path: Path) -> None:
    write_photos(tmp_path)
    pipelines = [open_pipeline(_config(tmp_path, **_RAW), 5, torch.device(name)) for name in ("cpu", "cuda")]
    streams = [[*pipeline.train(0, 0, slice(1, 8)), *pipeline.evaluate(0, 1, 4)] for pipeline in pipelines]
    for a, b in zip(*streams, strict=True):
        assert b.images.is_cuda
        assert torch.equal(a.ids, b.ids.cpu())
        assert torch.equal(a.targets, b.targets.cpu())
        assert (a.images - b.images.cpu()).abs().mean() < 2
    cutting.assert_rows_do_not_depend_on_the_cut(pipelines[1])
    for views in ("shared", "per_peer"):
        pipeline = open_pipeline(_config(tmp_path, views=views), 5, torch.device("cuda"))
        cutting.assert_a_view_is_the_same_in_any_company(pipeline)

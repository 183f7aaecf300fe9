"""Photos in any form give the same batches, bit for bit, on any number of ranks and after any pause."""

import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from data_pipelines import DataConfig, Pipeline, check_files, open_pipeline, open_validation
from data_pipelines.decoding.choice import dali_installed
from data_pipelines.preparing.verifying import count, verify
from tests.data_pipelines import cutting
from tests.data_pipelines.forms import write_arrow, write_parquet, write_shards

_FORMS: dict[str, Callable[[Path, Path], Any]] = {
    "image_folder": lambda photos, to: shutil.copytree(photos, to),
    "webdataset": write_shards,
    "hub": write_parquet,
    "hub, saved": write_arrow,
}
_DECODERS = ["torchvision", *(["cpu"] if dali_installed() else [])]


def _config(root: Path, form: str, decoder: str = "torchvision", **options: Any) -> DataConfig:
    values = {"global_batch": 8, "image": {"size": 32, "resize": 36}, "max_bad": 0.5} | options
    return DataConfig(dataset=form.partition(",")[0], root=root, decoding={"decoder": decoder, "threads": 2}, **values)


def _open(root: Path, form: str, decoder: str = "torchvision", **options: Any) -> Pipeline:
    return open_pipeline(_config(root, form, decoder, **options), 5, torch.device("cpu"))


@pytest.fixture(scope="module", params=_FORMS)
def form(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture(scope="module")
def root(form: str, photos: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    to = tmp_path_factory.mktemp("forms") / form
    _FORMS[form](photos, to)
    return to


@pytest.fixture(params=_DECODERS)
def pipeline(request: pytest.FixtureRequest, root: Path, form: str) -> Iterator[Pipeline]:
    opened = _open(root, form, request.param)
    yield opened
    opened.close()


def test_a_batch_is_that_of_the_folder(pipeline: Pipeline, form: str, photos: Path) -> None:
    decoder = pipeline._decoder_name  # type: ignore[attr-defined]
    folder = _open(photos, "image_folder", decoder)
    assert (pipeline.train_size, pipeline.eval_size, pipeline.num_classes) == (27, 15, 3)
    for epoch, rows in ((0, slice(0, 8)), (3, slice(2, 7))):
        for mine, expected in zip(pipeline.train(epoch, 0, rows), folder.train(epoch, 0, rows), strict=True):
            assert cutting.same(mine, expected)
    for mine, expected in zip(pipeline.evaluate(0, 1, 4), folder.evaluate(0, 1, 4), strict=True):
        assert cutting.same(mine, expected)
    folder.close()


def test_rows_do_not_depend_on_ranks_threads_or_the_place_in_the_epoch(pipeline: Pipeline) -> None:
    cutting.assert_a_batch_is_as_promised(pipeline, np.repeat([0, 1, 2], 9))
    cutting.assert_rows_do_not_depend_on_the_cut(pipeline)
    cutting.assert_an_epoch_can_begin_anywhere(pipeline)
    cutting.assert_each_validation_row_comes_once(pipeline)


def test_what_is_said_of_it(root: Path, form: str, pipeline: Pipeline) -> None:
    sizes = check_files(_config(root, form))
    assert (sizes.train, sizes.eval, sizes.classes) == (27, 15, 3)
    where = _config(root, form).where
    assert count(where) == 42
    assert [damaged for damaged in verify(where, 2) if damaged] == []
    assert set(pipeline.contents) == {"classes"} | {f"{s} {w}" for s in ("train", "val") for w in ("samples", "labels")}


def test_validation_under_the_classes_of_a_run(root: Path, form: str) -> None:
    names = _open(root, form).class_names
    assert names is not None
    found, _ = open_validation(_config(root, form), names[::-1], torch.device("cpu"))
    assert torch.cat([batch.targets for batch in found.evaluate(0, 1, 4)]).tolist() == [2] * 5 + [1] * 5 + [0] * 5
    found.close()


def test_a_sample_that_cannot_be_decoded_is_replaced_and_named(tmp_path: Path, form: str, photos: Path) -> None:
    """The sixth of the training images, of the second of three classes of three."""
    copied = Path(shutil.copytree(photos, tmp_path / "photos"))
    for path in copied.rglob("0[3-9].*"):
        path.unlink()
    (copied / "train/n001/02.JPEG").write_bytes(b"\xff\xd8 no photo \xff\xda\xff\xd9")
    _FORMS[form](copied, tmp_path / "form")
    pipeline = _open(tmp_path / "form", form, global_batch=9)
    (whole,) = pipeline.train(0, 0, slice(0, 9))
    assert sorted(whole.ids.tolist()) == [0, 1, 2, 3, 3, 4, 6, 7, 8]
    parts = [next(iter(pipeline.train(0, 0, rows))) for rows in (slice(0, 4), slice(4, 9))]
    assert cutting.same(cutting.join(parts), whole)
    assert pipeline.damage is not None
    (told,) = pipeline.damage.take()
    place = {
        "image_folder": "form/train/n001/02.JPEG",
        "webdataset": "form/train/train-000001.tar!n001_02.jpeg",
        "hub": "form/data/train-00001-of-00002.parquet!row 0",
        "hub, saved": "form/train!row 5",
    }[form]
    assert (told.split, told.path) == ("train", str(tmp_path / place))
    pipeline.close()

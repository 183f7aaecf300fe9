"""Arrow and Parquet data sets: what of them is taken, and mistakes."""

import sys
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet
import pytest

from data_pipelines import DataError
from data_pipelines.damage import UnreadableError
from data_pipelines.sources.contract import Source
from data_pipelines.sources.opening import open_photos, open_validation_alone
from data_pipelines.sources.sections import Where
from tests.data_pipelines.forms import bytes_of, rows_of, samples_of, write_parquet


def _open(root: Path, **options: Any) -> tuple[Source, Source]:
    open_photos.cache_clear()
    return open_photos(Where("hub", root, **options))


def _write(root: Path, columns: dict[str, list[Any]], **more: list[Any]) -> None:
    """As plain Parquet, of which nobody has said what the columns are."""
    for split in ("train", "test"):
        root.mkdir(exist_ok=True)
        pyarrow.parquet.write_table(pyarrow.table(columns | more), root / f"{split}.parquet")


_PLAIN = {"image": [{"bytes": b"a", "path": "a.jpg"}, {"bytes": b"b", "path": None}], "label": [1, 0]}


def test_plain_parquet_and_a_test_split_that_validates(tmp_path: Path) -> None:
    _write(tmp_path, _PLAIN)
    train, val = _open(tmp_path)
    assert [train.read(index) for index in range(2)] == [b"a", b"b"]
    assert (train.classes, train.labels.tolist()) == (("0", "1"), [1, 0])
    assert val.remarks == (f"validation: {tmp_path} has no such split, its test split takes the place",)
    assert val.place(1) == f"{tmp_path}/test.parquet!row 1"


def test_validation_alone_and_loose_arrow_files(photos: Path, tmp_path: Path) -> None:
    rows_of(photos, "val").save_to_disk(str(tmp_path / "saved"))
    (tmp_path / "loose").mkdir()
    (tmp_path / "saved/data-00000-of-00001.arrow").rename(tmp_path / "loose/set-validation.arrow")
    alone = open_validation_alone(Where("hub", tmp_path / "loose"), ("n002", "n001", "n000", "more"))
    assert alone.classes == ("n002", "n001", "n000", "more")
    assert alone.labels.tolist() == [2] * 5 + [1] * 5 + [0] * 5
    assert [alone.read(index) for index in range(15)] == bytes_of(samples_of(photos, "val"))


def test_what_is_written_for_parquet_lies_where_it_is_wanted(photos: Path, tmp_path: Path) -> None:
    write_parquet(photos, tmp_path / "set")
    _open(tmp_path / "set", cache=tmp_path / "cache")
    assert not (tmp_path / "set/.cohort").exists()
    assert list((tmp_path / "cache").glob("set-*/hub/**/*.arrow"))


@pytest.mark.parametrize(
    ("columns", "message"),
    [
        ({"label": [1, -1]}, r"column label: expected classes 0 to 1, found -1 in row 1"),
        ({"label": [1, None]}, r"column label: expected a class in each row"),
        ({"labels": [1, 2]}, r"expected one column of classes, found 2: label, labels; name one by data.label_column"),
        ({"img": [b"", b""]}, r"expected one column of images, found \['image', 'img'\]"),
    ],
)
def test_columns(tmp_path: Path, columns: dict[str, list[Any]], message: str) -> None:
    _write(tmp_path, _PLAIN, **columns)
    with pytest.raises(DataError, match=message):
        _open(tmp_path)


def test_a_column_of_classes_may_be_named(tmp_path: Path) -> None:
    _write(tmp_path, _PLAIN, fine_label=["cow", "cat"], other=[1, 2])
    assert _open(tmp_path, label_column="fine_label")[0].classes == ("cat", "cow")
    with pytest.raises(DataError, match=r"^label_column: 'fine': .*train.parquet has the columns image, label, fine_"):
        _open(tmp_path, label_column="fine")


def test_rows_without_an_image(tmp_path: Path) -> None:
    images = [{"bytes": b"", "path": None}, {"bytes": None, "path": "../secret.jpg"}]
    _write(tmp_path / "set", _PLAIN | {"image": images})
    (tmp_path / "secret.jpg").write_bytes(b"secret")
    train, _ = _open(tmp_path / "set")
    for index, message in enumerate(("expected an image, found an empty row", "expected an image inside")):
        with pytest.raises(UnreadableError, match=message):
            train.read(index)


def test_nothing_that_is_such_a_set(tmp_path: Path) -> None:
    (tmp_path / "train-0.parquet").write_bytes(b"no parquet")
    with pytest.raises(DataError, match=r"^.*train-0.parquet: cannot be read as parquet: "):
        _open(tmp_path)
    (tmp_path / "train-0.parquet").rename(tmp_path / "other.parquet")
    with pytest.raises(DataError, match=r"expected files with train or training in their names, found none among 1"):
        _open(tmp_path)


def test_without_the_library(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    _write(tmp_path, _PLAIN)
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(DataError) as caught:
        _open(tmp_path)
    assert str(caught.value) == (
        "dataset: hub needs the datasets library, which is not installed; pip install cohort[hub]"
    )

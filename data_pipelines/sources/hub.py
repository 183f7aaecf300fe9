"""Arrow and Parquet data sets as the Hugging Face Hub ships them, on this machine's disk: nothing is ever downloaded.

The `datasets` library maps Arrow files into memory, which gives any row at once. Parquet files hold rows in compressed
groups, so the library writes them as Arrow once, beside what else is kept of the data set.
"""

import hashlib
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from data_pipelines.damage import DataError, UnreadableError
from data_pipelines.sources import cache as caching
from data_pipelines.sources.contract import Source
from data_pipelines.sources.files import read_bytes

GET = (
    "hub wants a folder that the Hub ships, such as data/train-00000-of-00294.parquet and data/validation-*.parquet, "
    "Arrow files so named, or what save_to_disk wrote"
)
_SPLITS = {"train": ("train", "training"), "val": ("validation", "valid", "val", "test")}
_IMAGES, _LABELS = ("image", "img", "jpg", "jpeg", "png", "webp"), ("label", "labels", "cls", "class")


@dataclass(frozen=True)
class _Found:
    """A split on disk."""

    name: str
    files: tuple[Path, ...]
    kind: str  # parquet, arrow or saved; the last is a folder


def find(root: Path, split: str, *, alone: bool) -> _Found:
    """Looks for a split under its usual names; what is called test validates where nothing else is there.

    Args:
        root: of the data set, or of the split.
        split: train or val.
        alone: the split may be all that is there.

    Raises:
        DataError: it is not there.
    """
    for name in _SPLITS[split]:
        if (root / name / "state.json").is_file():
            return _Found(name, (root / name,), "saved")
    if alone and (root / "state.json").is_file():
        return _Found(split, (root,), "saved")
    several = ""
    for kind in ("arrow", "parquet"):
        beside = sorted(
            path
            for path in root.rglob(f"*.{kind}")
            if not any(part.startswith(".") for part in path.relative_to(root).parts)
        )
        for name in _SPLITS[split]:
            named = [path for path in beside if name in _words(path, root)]
            if named:
                return _Found(name, tuple(named), kind)
        if alone and beside:
            return _Found(split, tuple(beside), kind)
        several = several or (f" among {len(beside)} .{kind} files" if beside else "")
    wanted = " or ".join(_SPLITS[split])
    raise DataError(f"{root}: expected files with {wanted} in their names, found none{several}. {GET}")


def _words(path: Path, root: Path) -> set[str]:
    within = path.relative_to(root)
    return set(re.split("[^a-z]+", within.stem.lower())) | {part.lower() for part in within.parts[:-1]}


class HubSet(Source):
    """One split.

    Args:
        root: of the data set, or of the split.
        split: train or val.
        alone: the split may be all that is there.
        cache: see :func:`data_pipelines.sources.cache.folders`.
        label_column: which column holds the classes; None: the one that can.

    Raises:
        DataError: the `datasets` library is missing, files are or cannot be read, or columns are not as expected.
    """

    def __init__(self, root: Path, split: str, *, alone: bool, cache: Path | None, label_column: str | None) -> None:
        self._root, self._found = root, find(root, split, alone=alone)
        rows = _opened(self._found, root, cache)
        image, label = _columns(rows.features, self._found.files[0], label_column)
        self._image = image
        self.classes, self.labels = _labelled(rows, label, self._found.files[0])
        self._rows = _as_bytes(rows.select_columns([image]))
        if self._found.name == "test":
            self.remarks = (f"validation: {root} has no such split, its test split takes the place",)
        self._ends = np.array([], np.int64)
        if self._found.kind != "saved":
            self._ends = np.cumsum([_length(path, self._found.kind) for path in self._found.files])

    def read(self, index: int) -> bytes:
        """See :meth:`data_pipelines.sources.contract.Source.read`."""
        try:
            found = self._rows[index][self._image]
        except (OSError, ValueError) as error:
            raise UnreadableError(f"cannot be read: {error}") from None
        content = found.get("bytes") if isinstance(found, dict) else found
        if content is None and isinstance(found, dict) and found.get("path"):
            path = (self._root / found["path"]).resolve()
            if not path.is_relative_to(self._root.resolve()):
                raise UnreadableError(f"expected an image inside {self._root}, found the path {found['path']}")
            return read_bytes(str(path))
        if not content:
            raise UnreadableError("expected an image, found an empty row")
        return bytes(content)

    def place(self, index: int) -> str:
        """See :meth:`data_pipelines.sources.contract.Source.place`; rows of a file are counted from 0."""
        number = int(np.searchsorted(self._ends, index, side="right"))
        if number >= len(self._ends):
            return f"{self._found.files[0]}!row {index}"
        return f"{self._found.files[number]}!row {index - (int(self._ends[number - 1]) if number else 0)}"

    def place_of_class(self, label: int) -> str:
        """See :meth:`data_pipelines.sources.contract.Source.place_of_class`."""
        return f"{self._root}, class {self.classes[label]}"

    def digest(self) -> str:
        """See :meth:`data_pipelines.sources.contract.Source.digest`: names and sizes of the files."""
        sha = hashlib.sha256()
        for path in self._found.files:
            parts = sorted(path.glob("*.arrow")) if path.is_dir() else [path]
            for part in parts:
                sha.update(f"{part.name}/{part.stat().st_size}/".encode("utf-8", "surrogateescape"))
        return sha.hexdigest()


def _opened(found: _Found, root: Path, cache: Path | None) -> Any:
    try:
        import datasets
    except ImportError:
        raise DataError(
            "dataset: hub needs the datasets library, which is not installed; pip install cohort[hub]"
        ) from None
    try:
        if found.kind == "saved":
            return datasets.load_from_disk(str(found.files[0]))
        if found.kind == "arrow":
            return datasets.concatenate_datasets([datasets.Dataset.from_file(str(path)) for path in found.files])
        home = caching.writable(root, cache) / "hub"
        return datasets.Dataset.from_parquet([str(path) for path in found.files], cache_dir=str(home))
    except DataError:
        raise
    except Exception as error:  # Of any kind: pyarrow's, those of datasets, OSError.
        raise DataError(f"{found.files[0]}: cannot be read as {found.kind}: {error}. {GET}") from None


def _columns(features: Any, where: Path, label_column: str | None) -> tuple[str, str]:
    """The names of the columns of images and of classes."""
    import datasets

    images = [name for name, kind in features.items() if isinstance(kind, datasets.Image)]
    images = images or [name for name in features if name.lower() in _IMAGES]
    if len(images) != 1:
        raise DataError(f"{where}: expected one column of images, found {images or list(features)}")
    if label_column is not None:
        if label_column not in features:
            raise DataError(f"label_column: {label_column!r}: {where} has the columns {', '.join(features)}")
        return images[0], label_column
    labels = [name for name, kind in features.items() if isinstance(kind, datasets.ClassLabel)]
    labels = labels or [name for name in features if name.lower() in _LABELS]
    if len(labels) != 1:
        found = f"{len(labels)}: {', '.join(labels)}" if labels else f"none of {', '.join(features)}"
        raise DataError(
            f"label_column: {where}: expected one column of classes, found {found}; name one by data.label_column"
        )
    return images[0], labels[0]


def _labelled(rows: Any, column: str, where: Path) -> tuple[tuple[str, ...], NDArray[np.int64]]:
    kind = rows.features[column]
    values = rows.select_columns([column]).with_format("arrow")[:].column(column)
    said = np.array(values.to_pylist())
    if not len(said):
        raise DataError(f"{where}: expected rows, found none. {GET}")
    if said.dtype.kind == "U":
        texts, inverse = np.unique(said, return_inverse=True)
        return tuple(map(str, texts)), inverse.astype(np.int64)
    if said.dtype.kind not in "iu":
        raise DataError(f"{where}: column {column}: expected a class in each row, found {values.type}, or none")
    names = getattr(kind, "names", None) or [str(k) for k in range(int(said.max()) + 1)]
    wrong = np.flatnonzero((said < 0) | (said >= len(names)))
    if len(wrong):
        found = f"{said[wrong[0]]} in row {wrong[0]}"
        raise DataError(f"{where}: column {column}: expected classes 0 to {len(names) - 1}, found {found}")
    return tuple(names), said.astype(np.int64)


def _as_bytes(rows: Any) -> Any:
    import datasets

    (name, kind), *_ = rows.features.items()
    return rows.cast_column(name, datasets.Image(decode=False)) if isinstance(kind, datasets.Image) else rows


def _length(path: Path, kind: str) -> int:
    import datasets
    import pyarrow.parquet

    if kind == "parquet":
        return int(pyarrow.parquet.ParquetFile(path).metadata.num_rows)
    return len(datasets.Dataset.from_file(str(path)))


def known(classes: Sequence[str] | None, source: Source) -> Source:
    """A split whose classes are some of those that are known, under these."""
    if classes is None or tuple(classes) == source.classes or not set(source.classes) <= set(classes):
        return source
    places = {name: place for place, name in enumerate(classes)}
    return source.relabelled(tuple(classes), np.array([places[name] for name in source.classes], np.int64))

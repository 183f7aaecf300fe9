"""ImageNet-style folders, ROOT/train/<class>/*.JPEG and ROOT/val/<class>/*.JPEG: their listing, and their files."""

import io
import os
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from data_pipelines.contract import DataError

_EXTENSIONS = (".jpeg", ".jpg", ".png")
_GET = (
    "image_folder wants ROOT/train/<class>/*.JPEG and ROOT/val/<class>/*.JPEG; ImageNet (ILSVRC2012) comes from "
    "https://image-net.org/download-images"
)
_FORMATS = ("JPEG", "PNG", "WEBP", "BMP")  # by what is in a file, whatever its name says
FETCH = "Fetch the file again, or take it out"


@dataclass(frozen=True)
class Listing:
    """One split: the files sorted by class, then by name, so that an id means the same file on every machine.

    Attributes:
        folder: of the split.
        classes: names of the class folders, sorted.
        names: file name of each sample.
        labels: class of each sample, int64 [N].
    """

    folder: Path
    classes: tuple[str, ...]
    names: list[str]
    labels: NDArray[np.int64]

    def path(self, index: int) -> str:
        """Returns the path of a sample."""
        return f"{self.folder}/{self.classes[self.labels[index]]}/{self.names[index]}"


# check_files and open_pipeline both ask, and a walk of a million files on a network disk takes minutes.
@lru_cache(maxsize=1)
def list_folder(root: Path) -> tuple[Listing, Listing]:
    """Lists the training and the validation split.

    Raises:
        DataError: a split or class is missing or empty, the classes differ, or a link leads out of the root.
    """
    if not root.is_dir():
        raise DataError(f"root: {root} is not a folder. {_GET}")
    train, val = (_list_split(root, name) for name in ("train", "val"))
    if train.classes != val.classes:
        only_train = sorted(set(train.classes) - set(val.classes))
        only_val = sorted(set(val.classes) - set(train.classes))
        raise DataError(
            f"{root}: expected the same classes in train and val, found {len(only_train)} only in train "
            f"{only_train[:3]} and {len(only_val)} only in val {only_val[:3]}. {_GET}"
        )
    return train, val


def list_validation(root: Path) -> Listing:
    """Lists the validation split alone: ROOT/val/<class>/*.JPEG, or ROOT/<class>/*.JPEG where there is no ROOT/val.

    Raises:
        DataError: it is missing or empty, or a link leads out of the root.
    """
    if not root.is_dir():
        raise DataError(f"root: {root} is not a folder. {_GET}")
    return _list_split(root, "val" if (root / "val").is_dir() else ".")


class Files:
    """Reads encoded files, and remembers the size of each photo once its header was seen."""

    def __init__(self, listing: Listing) -> None:
        self.listing = listing
        self._sizes = np.zeros((len(listing.names), 2), np.int32)

    def read(self, ids: NDArray[np.int64]) -> tuple[list[NDArray[np.uint8]], NDArray[np.int64]]:
        """Returns the bytes of each file, and the (height, width) of each photo, int64 [n, 2]."""
        encoded = [self._read(index) for index in ids]
        return encoded, self._sizes[ids].astype(np.int64)

    def _read(self, index: int) -> NDArray[np.uint8]:
        path = self.listing.path(index)
        try:
            with open(path, "rb") as file:
                encoded = file.read()
            if not self._sizes[index, 0]:
                with Image.open(io.BytesIO(encoded), formats=_FORMATS) as header:
                    self._sizes[index] = header.height, header.width
        except OSError as error:
            raise DataError(
                f"{path}: expected a JPEG or PNG image, found a file that is neither or cannot be read. {FETCH}"
            ) from error
        return np.frombuffer(encoded, np.uint8)


def _list_split(root: Path, name: str) -> Listing:
    folder = root / name
    if not folder.is_dir():
        raise DataError(f"{folder}: no such folder. {_GET}")
    _require_inside(folder, root)
    classes = tuple(entry.name for entry in _entries(folder, root) if entry.is_dir())
    if not classes:
        raise DataError(f"{folder}: expected one folder for each class, found none. {_GET}")
    names: list[str] = []
    counts = []
    for each in classes:
        files = [
            entry.name
            for entry in _entries(folder / each, root)
            if entry.name.lower().endswith(_EXTENSIONS) and entry.is_file()
        ]
        if not files:
            raise DataError(f"{folder / each}: expected at least one {', '.join(_EXTENSIONS)} file, found none. {_GET}")
        names += files
        counts.append(len(files))
    return Listing(folder, classes, names, np.repeat(np.arange(len(classes), dtype=np.int64), counts))


def _entries(folder: Path, root: Path) -> list[os.DirEntry[str]]:
    with os.scandir(folder) as found:
        entries = sorted((entry for entry in found if not entry.name.startswith(".")), key=lambda entry: entry.name)
    for entry in entries:
        # Only links are resolved: a directory entry knows that it is one without a visit to the disk.
        if entry.is_symlink():
            _require_inside(Path(entry.path), root)
    return entries


def _require_inside(path: Path, root: Path) -> None:
    target = path.resolve()
    if not target.is_relative_to(root.resolve()):
        raise DataError(
            f"{path}: expected a file or folder inside {root}, found a link to {target}. Copy it, or link inside."
        )
    if not target.exists():
        raise DataError(f"{path}: expected a file or folder, found a link to {target}, which does not exist.")

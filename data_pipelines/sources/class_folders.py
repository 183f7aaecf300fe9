"""ImageNet-style folders, ROOT/train/<class>/*.JPEG and ROOT/val/<class>/*.JPEG: their listing, and their files."""

import os
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from data_pipelines.contract import DataError
from data_pipelines.damage import FETCH, Damage, Damaged, UnreadableError
from data_pipelines.sources.files import measured, read_bytes, stand_in

_EXTENSIONS = (".jpeg", ".jpg", ".png")
_GET = (
    "image_folder wants ROOT/train/<class>/*.JPEG and ROOT/val/<class>/*.JPEG; ImageNet (ILSVRC2012) comes from "
    "https://image-net.org/download-images"
)


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


@dataclass(frozen=True)
class Read:
    """Encoded photos.

    Attributes:
        ids: which samples these are; not those that were asked for where some were replaced: int64 [n].
        encoded: the bytes of each, uint8.
        sizes: (height, width) of each, int64 [n, 2].
        readable: whether it is the sample, or stands in for one that is to be counted as wrong: bool [n].
    """

    ids: NDArray[np.int64]
    encoded: list[NDArray[np.uint8]]
    sizes: NDArray[np.int64]
    readable: NDArray[np.bool_]


class Files:
    """Reads encoded files, and remembers the size of each photo once its header was seen.

    Args:
        listing: of the files.
        split: its name, train or val.
        damage: is told of files that cannot be read.
    """

    def __init__(self, listing: Listing, split: str, damage: Damage) -> None:
        self.listing, self._split, self._damage = listing, split, damage
        self._sizes = np.zeros((len(listing.names), 2), np.int32)

    def tell(self, index: int, reason: str) -> None:
        """Tells that a sample cannot be used. Raises: DataError, where the run is to end for it."""
        self._damage.tell(Damaged(self._split, self.listing.path(index), reason))

    def read(self, ids: NDArray[np.int64], among: NDArray[np.int64], broken: frozenset[int] = frozenset()) -> Read:
        """Reads samples to train on. One that cannot be read is replaced by the next of its class that can, the last
        one by the first: by a rule of the id alone, so that all ranks replace alike.

        Args:
            ids: which, int64 [n].
            among: what may take their places, ascending, int64.
            broken: those that are there and cannot be decoded; whoever found that has told of it.

        Raises:
            DataError: nothing of a class can be read, or the run is to end for what cannot.
        """
        read = [self._or_next(int(index), among, broken) for index in ids]
        used = np.array([index for index, _ in read], np.int64)
        return Read(used, [encoded for _, encoded in read], self._sizes[used].astype(np.int64), np.ones(len(ids), bool))

    def read_as_they_are(self, ids: NDArray[np.int64], broken: frozenset[int] = frozenset()) -> Read:
        """Reads samples of which each is wanted once; something grey stands in for one that cannot be read.

        Raises:
            DataError: the run is to end for it.
        """
        encoded, sizes, readable = [], np.empty((len(ids), 2), np.int64), np.ones(len(ids), bool)
        for row, index in enumerate(ids):
            found = None if int(index) in broken else self._told(int(index))
            if found is None:
                found, sizes[row] = stand_in()
                readable[row] = False
            else:
                sizes[row] = self._sizes[index]
            encoded.append(found)
        return Read(ids, encoded, sizes, readable)

    def _or_next(self, wanted: int, among: NDArray[np.int64], broken: frozenset[int]) -> tuple[int, NDArray[np.uint8]]:
        if wanted not in broken and (encoded := self._told(wanted)) is not None:
            return wanted, encoded
        label = self.listing.labels[wanted]
        kin = among[self.listing.labels[among] == label]
        after = np.searchsorted(kin, wanted, side="right")
        for index in np.roll(kin, -after).tolist():
            if index != wanted and index not in broken and (encoded := self._told(index)) is not None:
                return index, encoded
        raise DataError(
            f"{self.listing.folder / self.listing.classes[label]}: expected at least one image that can be read, found "
            f"{len(kin)} that cannot. {FETCH}"
        )

    def _told(self, index: int) -> NDArray[np.uint8] | None:
        """The bytes of a file; None where they are no image, which is told."""
        try:
            content = read_bytes(self.listing.path(index))
            if not self._sizes[index, 0]:
                self._sizes[index] = measured(content)
        except UnreadableError as error:
            self.tell(index, str(error))
            return None
        return np.frombuffer(content, np.uint8)


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

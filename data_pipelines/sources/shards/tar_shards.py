"""Samples of tar shards, read where they lie: at their offsets, with no look at what lies before them."""

import hashlib
import os
import re
import resource
import threading
from collections import OrderedDict
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from data_pipelines.damage import DataError, UnreadableError
from data_pipelines.sources.contract import Source, left_out
from data_pipelines.sources.files import patiently
from data_pipelines.sources.folders.walking import Links, require_allowed
from data_pipelines.sources.labels import read_labels
from data_pipelines.sources.names import Names
from data_pipelines.sources.shards.indexing import Index, index

GET = (
    "webdataset wants ROOT/train/*.tar and ROOT/val/*.tar, or ROOT/*.tar with train and val in their names, as the Hub "
    "ships timm/imagenet-1k-wds; launch/shard.py makes such shards of folders"
)
_SPLITS = {"train": {"train", "training"}, "val": {"val", "valid", "validation"}}
_WNID = re.compile(r"(?:.*/)?(n\d{8})[_./]")


def shards_of(root: Path, split: str, *, alone: bool, links: Links) -> list[Path]:
    """The shards of a split, sorted by name, numbers by their value: those in ROOT/SPLIT, or in ROOT those with the
    split in their names.

    Args:
        root: of the data set, or of the split.
        split: train or val.
        alone: the split may be all that is there.
        links: whether links may lead out of the root.

    Raises:
        DataError: there are none.
    """
    for folder in (root / split, *(root / other for other in sorted(_SPLITS[split] - {split}))):
        if folder.is_dir():
            require_allowed(folder, root, links)
            found = _tars(folder, root, links)
            if not found:
                raise DataError(f"{folder}: expected at least one .tar file, found none. {GET}")
            return found
    beside = _tars(root, root, links)
    named = [path for path in beside if _SPLITS[split] & set(re.split("[^a-z]+", path.stem.lower()))]
    if not named and not (alone and beside):
        raise DataError(f"{root}: expected shards with {split} in their names, found none among {len(beside)}. {GET}")
    return named or beside


def _tars(folder: Path, root: Path, links: Links) -> list[Path]:
    found = sorted((path for path in folder.glob("*.tar") if not path.name.startswith(".")), key=_by_number)
    for path in found:
        if path.is_symlink():
            require_allowed(path, root, links)
    return found


def _by_number(path: Path) -> tuple[list[tuple[int, str]], str]:
    parts = re.findall(r"\d+|\D+", path.name)
    return [(int(part), "") if part.isdecimal() else (-1, part) for part in parts], path.name


class TarShards(Source):
    """One split.

    Args:
        shards: the files.
        root: of the data set.
        cache: see :func:`data_pipelines.sources.cache.folders`.
        split: its name.
        classes: known ones, in the order of labels; None if nobody has said.
        listed: whether `data.classes` lists them.
        labels_file: says the class of each sample, see :func:`data_pipelines.sources.labels.read_labels`; None: the
            samples do.

    Raises:
        DataError: a shard is damaged, a sample is of no class, or there is none.
    """

    def __init__(
        self,
        shards: Sequence[Path],
        root: Path,
        *,
        cache: Path | None,
        split: str,
        classes: Sequence[str] | None = None,
        listed: bool = False,
        labels_file: Path | None = None,
    ) -> None:
        found = index(shards, root, cache, f"tar-{split}")
        if not len(found.names):
            raise DataError(f"{shards[0].parent}: expected samples in {len(shards)} shards, found none. {GET}")
        self._shards, self._shard, self._offset, self._size = found.shards, found.shard, found.offset, found.size
        self._names = found.names
        said = found.labels
        if labels_file is not None:
            bases = [name.rsplit("/", 1)[-1] for name in found.names]
            wanted = sorted(bases)
            given = dict(zip(wanted, read_labels(labels_file, wanted, classes, listed=listed), strict=True))
            said = np.array([given[base] for base in bases])
        self.classes, self.labels = _labelled(found, said, classes)
        self.remarks = left_out(sorted(found.left.items()), f"{len(shards)} shards of {shards[0].parent}")
        self._open = _Descriptors(self._shards)

    def read(self, index: int) -> bytes:
        """See :meth:`data_pipelines.sources.contract.Source.read`."""
        size = int(self._size[index])
        content = patiently(lambda: self._open.read(int(self._shard[index]), size, int(self._offset[index])))
        if len(content) < size:
            raise UnreadableError(f"expected {size} bytes in the shard, found {len(content)}: it was cut short since")
        if not content:
            raise UnreadableError("expected an image, found an empty file")
        return content

    def place(self, index: int) -> str:
        """See :meth:`data_pipelines.sources.contract.Source.place`."""
        return f"{self._shards[self._shard[index]]}!{self._names[index]}"

    def place_of_class(self, label: int) -> str:
        """See :meth:`data_pipelines.sources.contract.Source.place_of_class`."""
        return f"{self._shards[0].parent}, class {self.classes[label]}"

    def digest(self) -> str:
        """See :meth:`data_pipelines.sources.contract.Source.digest`: names of shards and members, and sizes."""
        sha = hashlib.sha256("/".join(path.name for path in self._shards).encode("utf-8", "surrogateescape"))
        for array in (self._shard, self._size, self._names.text):
            sha.update(np.ascontiguousarray(array).data)
        return sha.hexdigest()


def _labelled(
    found: Index, said: NDArray[np.str_], classes: Sequence[str] | None
) -> tuple[tuple[str, ...], NDArray[np.int64]]:
    """The classes, and the label of each sample."""
    unlabelled = np.flatnonzero(said == "")
    if len(unlabelled) == len(said) and len(found.shards) > 1:
        said = np.array([path.stem for path in found.shards])[found.shard]  # ILSVRC's own, a tar for each class
    elif len(unlabelled):
        place = f"{found.shards[found.shard[unlabelled[0]]]}!{found.names[int(unlabelled[0])]}"
        raise DataError(
            f"{place}: expected a .cls or .json beside it that says its class, found none; so do {len(unlabelled)} of "
            f"{len(said)} samples"
        )
    texts, inverse = np.unique(said, return_inverse=True)
    inverse = inverse.astype(np.int64)
    if all(text.isdecimal() for text in texts) and not set(texts.tolist()) <= set(classes or ()):
        numbers = texts.astype(np.int64)
        if classes is None:
            classes = _named(found.names, numbers, inverse)
        elif numbers.max() >= len(classes):
            first = int(np.flatnonzero(inverse == numbers.argmax())[0])
            place = f"{found.shards[found.shard[first]]}!{found.names[first]}"
            raise DataError(f"{place}: expected a class below {len(classes)}, found {numbers.max()}")
        return tuple(classes), numbers[inverse]
    names = tuple(map(str, texts))
    known = {name: place for place, name in enumerate(classes or ())}
    if known.keys() >= set(names) and classes is not None:
        return tuple(classes), np.array([known[name] for name in names], np.int64)[inverse]
    return names, inverse


def _named(names: Names, numbers: NDArray[np.int64], inverse: NDArray[np.int64]) -> tuple[str, ...]:
    """Names of classes that are numbers: the synsets in the names of their images, where these say one for each."""
    known: dict[int, str] = {}
    for place in np.unique(inverse, return_index=True)[1].tolist():
        match = _WNID.match(names[place])
        if not match:
            known = {}
            break
        known[int(numbers[inverse[place]])] = match[1]
    if len(set(known.values())) < len(known):
        known = {}
    return tuple(known.get(number, str(number)) for number in range(int(numbers.max()) + 1))


class _Descriptors:
    """Open files, no more than half of those that a process may have; who reads one keeps it from being closed."""

    def __init__(self, paths: Sequence[Path]) -> None:
        self._paths, self._lock = paths, threading.Lock()
        self._most = max(resource.getrlimit(resource.RLIMIT_NOFILE)[0] // 2, 16)
        self._open: OrderedDict[int, list[int]] = OrderedDict()  # shard -> [descriptor, readers]

    def read(self, shard: int, size: int, offset: int) -> bytes:
        """Raises: OSError."""
        with self._lock:
            if shard not in self._open:
                self._make_room()
                self._open[shard] = [os.open(self._paths[shard], os.O_RDONLY | os.O_CLOEXEC), 0]
            self._open.move_to_end(shard)
            entry = self._open[shard]
            entry[1] += 1
        try:
            content = os.pread(entry[0], size, offset)
            while len(content) < size and (more := os.pread(entry[0], size - len(content), offset + len(content))):
                content += more
            return content
        except OSError:
            with self._lock:
                self._open.pop(shard, None)  # A stale handle stays stale: the next try opens the file anew.
            raise
        finally:
            with self._lock:
                entry[1] -= 1
                if not entry[1] and self._open.get(shard) is not entry:
                    os.close(entry[0])

    def _make_room(self) -> None:
        for shard in [shard for shard, (_, readers) in self._open.items() if not readers]:
            if len(self._open) < self._most:
                return
            os.close(self._open.pop(shard)[0])

    def __del__(self) -> None:
        for descriptor, _ in self._open.values():
            os.close(descriptor)

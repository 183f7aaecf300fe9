"""A folder for each class, as ImageNet has them and torchvision's ImageFolder wants them: the listing of one split."""

import contextlib
import json
import os
from collections import Counter
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from data_pipelines.damage import DataError
from data_pipelines.sources import cache as caching
from data_pipelines.sources.contract import Source, left_out
from data_pipelines.sources.files import read_bytes
from data_pipelines.sources.folders.walking import (
    EXTENSIONS,
    Links,
    Walk,
    changed,
    entries,
    require_allowed,
    walk,
)
from data_pipelines.sources.names import Names

GET = (
    "image_folder wants ROOT/train/<class>/*.JPEG and ROOT/val/<class>/*.JPEG; ImageNet (ILSVRC2012) comes from "
    "https://image-net.org/download-images"
)
_FORMAT = 1
_KEPT_FROM = 10_000  # images; the listing of fewer is as quick as its cache
_TICK = 2_000_000_000  # ns that a file system may take for one and the same moment
_AT_ONCE = 16  # folders: a network disk answers many as fast as one


class ClassFolders(Source):
    """One split: the files sorted by class, then by name, so that an id means the same file on every machine.

    Args:
        folder: of the split.
        folders: names of the class folders.
        names: paths of the files within these, a folder after the other.
        counts: files of each folder, int64.
        remarks: see :class:`data_pipelines.sources.contract.Source`.
    """

    def __init__(
        self,
        folder: Path,
        folders: tuple[str, ...],
        names: Names,
        counts: NDArray[np.int64],
        remarks: tuple[str, ...] = (),
    ) -> None:
        self.folder, self.names, self.remarks = folder, names, remarks
        self._folders, self._counts = folders, counts
        self._starts = np.cumsum(counts)
        self.classes, self.labels = folders, np.repeat(np.arange(len(folders), dtype=np.int64), counts)

    def read(self, index: int) -> bytes:
        """See :meth:`data_pipelines.sources.contract.Source.read`."""
        return read_bytes(self.place(index))

    def place(self, index: int) -> str:
        """See :meth:`data_pipelines.sources.contract.Source.place`."""
        owner = self._folders[int(np.searchsorted(self._starts, index, side="right"))]
        return f"{self.folder}/{owner}/{self.names[index]}"

    def place_of_class(self, label: int) -> str:
        """See :meth:`data_pipelines.sources.contract.Source.place_of_class`."""
        return f"{self.folder}/{self.classes[label]}"

    def digest(self) -> str:
        """See :meth:`data_pipelines.sources.contract.Source.digest`."""
        return self.names.digest()


def list_split(
    folder: Path, root: Path, *, links: Links = "inside", cache: Path | None = None, split: str = "train"
) -> ClassFolders:
    """Lists FOLDER/<class>/**, or takes the listing of before where no folder has changed since.

    Args:
        folder: of the split.
        root: that links may not leave, if `links` says so; and beside which the listing is kept.
        links: where links may lead.
        cache: another place for the listing, see :func:`data_pipelines.sources.cache.folders`.
        split: its name there.

    Raises:
        DataError: it is missing, it or a class is empty, or a link leads where it may not.
    """
    if not folder.is_dir():
        raise DataError(f"{folder}: no such folder. {GET}")
    require_allowed(folder, root, links)
    name = f"{split}-{links}.npz"
    for path in (kept / name for kept in caching.folders(root, cache)):
        if listing := _kept(path, folder):
            return listing
    here = changed(folder)
    left: Counter[str] = Counter()
    classes = []
    for entry in entries(folder, root, links, left):
        if entry.is_dir():
            classes.append(entry.name)
        else:
            left["files beside the class folders"] += 1
    if not classes:
        raise DataError(f"{folder}: expected one folder for each class, found none. {GET}")
    walks = _walk_all(folder, classes, root, links)
    for each, found in zip(classes, walks, strict=True):
        if not found.names:
            raise DataError(
                f"{folder / each}: expected at least one image ({', '.join(EXTENSIONS)}), found none. {GET}"
            )
        left += found.left
    names = Names.of([name for found in walks for name in found.names])
    counts = np.array([len(found.names) for found in walks], np.int64)
    listing = ClassFolders(folder, tuple(classes), names, counts, left_out(sorted(left.items()), str(folder)))
    if len(names) >= _KEPT_FROM or cache is not None:
        visited = [(".", here)]
        for each, found in zip(classes, walks, strict=True):
            visited += [(os.path.normpath(f"{each}/{within}"), when) for within, when in found.visited]
        _keep(name, listing, visited, root, cache)
    return listing


def _walk_all(folder: Path, classes: Sequence[str], root: Path, links: Links) -> list[Walk]:
    with ThreadPoolExecutor(_AT_ONCE, thread_name_prefix="cohort-listing") as pool:
        walks = pool.map(lambda name: walk(folder / name, root, links, nested=True), classes)
        found = []
        with caching.bar(len(classes), f"listing {folder}", "classes") as shown:
            for each in walks:
                found.append(each)
                shown.update()
    return found


def _keep(name: str, listing: ClassFolders, visited: Sequence[tuple[str, int]], root: Path, cache: Path | None) -> None:
    arrays: dict[str, Any] = {
        "names": listing.names.text,
        "ends": listing.names.ends,
        "counts": np.bincount(listing.labels, minlength=len(listing.classes)),
        "about": np.frombuffer(
            json.dumps(
                {"format": _FORMAT, "classes": listing.classes, "visited": visited, "remarks": listing.remarks}
            ).encode(),
            np.uint8,
        ),
    }
    try:
        path = caching.writable(root, cache) / name
    except DataError:
        if cache is not None:
            raise
        return
    with contextlib.suppress(OSError, _TooYoungError), caching.aside(path) as file:
        # What was changed just now may change once more without another time: then it is listed again next time.
        if max(when for _, when in visited) > os.fstat(file.fileno()).st_mtime_ns - _TICK:
            raise _TooYoungError
        np.savez(file, **arrays)


class _TooYoungError(Exception):
    pass


def _kept(path: Path, folder: Path) -> ClassFolders | None:
    """The listing that was kept, if it is still right."""
    found = caching.load(path)
    try:
        if found is None:
            return None
        about = json.loads(found["about"].tobytes())
        if about["format"] != _FORMAT:
            return None
        names, counts = Names(found["names"], found["ends"]), found["counts"]
        classes, remarks = tuple(map(str, about["classes"])), tuple(map(str, about["remarks"]))
        if len(counts) != len(classes) or counts.sum() != len(names):
            return None
        if not names.valid() or not Names.of(classes).valid():
            return None
        visited = [(str(within), int(when)) for within, when in about["visited"]]
    except (KeyError, ValueError, TypeError, AttributeError):
        return None
    if {within.split("/")[0] for within, _ in visited} != {".", *classes}:
        return None

    def same(place: tuple[str, int]) -> bool:
        try:
            return changed(folder / place[0]) == place[1]
        except OSError:
            return False

    with ThreadPoolExecutor(_AT_ONCE, thread_name_prefix="cohort-listing") as pool:
        if not all(pool.map(same, visited)):
            return None
    return ClassFolders(folder, classes, names, counts.astype(np.int64), remarks)

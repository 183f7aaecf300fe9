"""Where each sample lies in tar shards: looked up once, by many threads, kept, and looked up again where it changed.

What is known of a shard is kept as soon as it is known, so a look that was stopped goes on, and processes that look at
once share the work.
"""

import contextlib
import json
import os
import random
import shutil
import tarfile
from collections import Counter
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import numpy as np
from numpy.typing import NDArray

from data_pipelines.damage import DataError
from data_pipelines.sources import cache as caching
from data_pipelines.sources.folders.walking import EXTENSIONS
from data_pipelines.sources.names import Names

_FORMAT = 1
_AT_ONCE = 16  # shards: a network disk answers many as fast as one
_LABELS = ("label", "cls", "class")  # of a sample's JSON, the first that is there
_LARGEST_TEXT = 1 << 20  # bytes of a .cls or .json


@dataclass(frozen=True)
class Index:
    """Samples of some shards, in the order in which they lie there.

    Attributes:
        shards: the files.
        shard: of each sample, its place in them, int32 [N].
        offset: where its image begins, in bytes, int64 [N].
        size: of its image, in bytes, int64 [N].
        names: paths of the images in their shards.
        labels: what is said of the class of each, "" where nothing is, str [N].
        left: how many members are no samples, by the reason.
    """

    shards: tuple[Path, ...]
    shard: NDArray[np.int32]
    offset: NDArray[np.int64]
    size: NDArray[np.int64]
    names: Names
    labels: NDArray[np.str_]
    left: Counter[str]


def index(shards: Sequence[Path], root: Path, cache: Path | None, name: str) -> Index:
    """Looks up the samples of shards, or takes what is kept where none has changed.

    Args:
        shards: tar files.
        root: of the data set.
        cache: where it is kept, see :func:`data_pipelines.sources.cache.folders`.
        name: under which.

    Raises:
        DataError: a shard is no tar file, or cut short.
    """
    stamps = _stamps(shards)
    about = {"format": _FORMAT, "shards": [[path.name, *stamp] for path, stamp in zip(shards, stamps, strict=True)]}
    for folder in caching.folders(root, cache):
        if found := _read(folder / f"{name}.npz", about, shards):
            return found
    try:
        home = caching.writable(root, cache)
        parts = home / f"{name}.parts"
        parts.mkdir(exist_ok=True)
    except (OSError, DataError):
        if cache is not None:
            raise
        parts = home = None  # type: ignore[assignment]
    found = _joined([*_each(shards, stamps, parts)])
    if home is not None:
        with contextlib.suppress(OSError):
            _write(home / f"{name}.npz", about, found)
            shutil.rmtree(parts, ignore_errors=True)
    return found


def _stamps(shards: Sequence[Path]) -> list[tuple[int, int]]:
    def stamp(path: Path) -> tuple[int, int]:
        try:
            found = path.stat()
        except OSError as error:
            raise DataError(f"{path}: cannot be read: {error.strerror}") from None
        return found.st_size, found.st_mtime_ns

    with ThreadPoolExecutor(_AT_ONCE, thread_name_prefix="cohort-index") as pool:
        return list(pool.map(stamp, shards))


def _each(shards: Sequence[Path], stamps: Sequence[tuple[int, int]], parts: Path | None) -> Iterator[Index]:
    def one(place: int) -> tuple[int, Index]:
        path, kept = shards[place], parts and parts / f"{shards[place].name}.npz"
        about = {"format": _FORMAT, "shards": [[path.name, *stamps[place]]]}
        if kept and (found := _read(kept, about, [path])):
            return place, found
        found = index_shard(path)
        if kept:
            with contextlib.suppress(OSError):
                _write(kept, about, found)
        return place, found

    places = list(range(len(shards)))
    random.Random(os.getpid()).shuffle(places)  # Other processes that look as well begin with others.
    results: dict[int, Index] = {}
    with ThreadPoolExecutor(_AT_ONCE, thread_name_prefix="cohort-index") as pool:
        try:
            with caching.bar(len(shards), f"indexing {shards[0].parent}", "shards") as shown:
                for place, found in pool.map(one, places):
                    results[place] = found
                    shown.update()
        except BaseException:
            pool.shutdown(cancel_futures=True)
            raise
    return (results[place] for place in range(len(shards)))


def index_shard(path: Path) -> Index:
    """Looks up the samples of one shard; in a tar of tars, as ILSVRC's, those of all within.

    Raises:
        DataError: it is no tar file, or cut short.
    """
    offsets, sizes, names, labels, left = [], [], [], [], Counter[str]()
    try:
        with path.open("rb") as file:
            for group in _samples(file, ""):
                images = [member for member in group if _suffix(member.name).endswith(EXTENSIONS)]
                if not images:
                    left["samples without an image"] += 1
                    continue
                left["further images of a sample"] += len(images) - 1
                image = images[0]
                offsets.append(image.offset)
                sizes.append(image.size)
                names.append(image.name)
                labels.append(_label(file, group) or image.within)
    except tarfile.TarError as error:
        raise DataError(f"{path}: expected a whole tar file, found one that is cut short or damaged: {error}") from None
    except OSError as error:
        raise DataError(f"{path}: cannot be read: {error.strerror or error}") from None
    return Index(
        (path,),
        np.zeros(len(names), np.int32),
        np.array(offsets, np.int64),
        np.array(sizes, np.int64),
        Names.of(names),
        np.array(labels, np.str_),
        left,
    )


@dataclass(frozen=True)
class _Member:
    name: str
    offset: int
    size: int
    within: str  # the tar of a class that it lies in, without its suffix, where tars lie in a tar


def _samples(file: IO[bytes], within: str) -> Iterator[list[_Member]]:
    """Members one after another that are called alike up to the first dot, which webdataset takes for one sample."""
    group: list[_Member] = []
    with tarfile.open(fileobj=file, mode="r:") as tar:
        while (info := tar.next()) is not None:
            tar.members = []  # type: ignore[attr-defined]  # which would otherwise hold them all
            if not info.isreg():
                continue
            base = info.name.rsplit("/", 1)[-1]
            if base.startswith(".") or info.name.startswith("__"):
                continue
            if base.endswith(".tar") and not within:
                file.seek(info.offset_data)
                yield from _samples(file, base[: -len(".tar")])
                continue
            name = os.path.normpath(f"{within}/{info.name}" if within else info.name).lstrip("/")
            member = _Member(name, info.offset_data, info.size, within)
            if group and _key(group[0].name) != _key(name):
                yield group
                group = []
            group.append(member)
        file.seek(tar.offset)
        if any(file.read(tarfile.BLOCKSIZE)):  # tarfile takes a header that it cannot read for the end
            raise tarfile.ReadError(f"no header at byte {tar.offset}")
    if group:
        yield group


def _key(name: str) -> str:
    folder, slash, base = name.rpartition("/")
    return folder + slash + base.partition(".")[0]


def _suffix(name: str) -> str:
    _, dot, suffix = name.rpartition("/")[2].partition(".")
    return (dot + suffix).lower()


def _label(file: IO[bytes], group: Sequence[_Member]) -> str:
    by_suffix = {_suffix(member.name): member for member in group}
    for suffix in (".cls", ".json"):
        member = by_suffix.get(suffix)
        if member is None or member.size > _LARGEST_TEXT:
            continue
        file.seek(member.offset)
        text = file.read(member.size).decode("utf-8", "replace").strip()
        if suffix == ".cls":
            return text
        try:
            said = json.loads(text)
        except ValueError:
            continue
        for key in _LABELS:
            if isinstance(said, dict) and isinstance(said.get(key), int | str):
                return str(said[key])
    return ""


def _joined(parts: Sequence[Index]) -> Index:
    texts = [part.names.text for part in parts if len(part.names)]
    lengths = np.array([len(part.names.text) + 1 if len(part.names) else 0 for part in parts], np.int64)
    starts = np.cumsum(lengths) - lengths
    slash = np.frombuffer(b"/", np.uint8)
    text = np.concatenate([piece for each in texts for piece in (slash, each)][1:]) if texts else slash[:0]
    return Index(
        tuple(path for part in parts for path in part.shards),
        np.repeat(np.arange(len(parts), dtype=np.int32), [len(part.offset) for part in parts]),
        np.concatenate([part.offset for part in parts]),
        np.concatenate([part.size for part in parts]),
        Names(text, np.concatenate([part.names.ends + start for part, start in zip(parts, starts, strict=True)])),
        np.concatenate([part.labels for part in parts]),
        sum((part.left for part in parts), Counter[str]()),
    )


def _write(path: Path, about: dict[str, Any], found: Index) -> None:
    caching.save(
        path,
        {
            "about": np.frombuffer(json.dumps({**about, "left": found.left}).encode(), np.uint8),
            "shard": found.shard,
            "offset": found.offset,
            "size": found.size,
            "names": found.names.text,
            "ends": found.names.ends,
            "labels": found.labels,
        },
    )


def _read(path: Path, about: dict[str, Any], shards: Sequence[Path]) -> Index | None:
    """What was written, if it is of the same shards."""
    found = caching.load(path)
    try:
        if found is None:
            return None
        said = json.loads(found["about"].tobytes())
        left = Counter({str(what): int(count) for what, count in said.pop("left").items()})
        names, shard, offset, size = (Names(found["names"], found["ends"]), *(found[k] for k in _ARRAYS))
        labels = found["labels"]
        if said != about or not names.valid() or {len(a) for a in (shard, offset, size, labels)} != {len(names)}:
            return None
        ends = np.array([size for _, size, _ in about["shards"]], np.int64)
        if len(names) and not (shard.min() >= 0 and shard.max() < len(ends)):
            return None
        if (offset < 0).any() or (size < 0).any() or (offset + size > ends[shard]).any() or labels.dtype.kind != "U":
            return None
    except (KeyError, ValueError, TypeError, AttributeError, IndexError):
        return None
    return Index(tuple(shards), shard, offset, size, names, labels, left)


_ARRAYS = ("shard", "offset", "size")

"""Packs class folders into tar shards, several at a time; a run of it that was stopped goes on.

A sample is NUMBER.jpg (or .png, ...), NUMBER.cls with its label and NUMBER.json with the name of its class and file:
webdataset's conventions. The same folder gives the same bytes: members have neither owner nor time.
"""

import io
import json
import tarfile
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from data_pipelines import order
from data_pipelines.damage import Damaged, DataError, UnreadableError
from data_pipelines.decoding.with_torchvision import silence
from data_pipelines.preparing.whole import whole
from data_pipelines.sources import cache as caching
from data_pipelines.sources.contract import Source
from data_pipelines.sources.files import measured
from data_pipelines.sources.shards.indexing import index

_SUFFIXES = {"JPEG": "jpg", "MPO": "jpg", "PNG": "png", "WEBP": "webp", "BMP": "bmp", "PPM": "ppm", "TIFF": "tif"}
_PLAN = "plan.json"


@dataclass(frozen=True)
class Packing:
    """How photos are packed.

    Attributes:
        per_shard: photos of a shard.
        shuffled: whether they lie in a shuffled order, or in that of ids: by class, then by name.
        seed: of that order.
        shorter_side: larger photos are made so small, in pixels; None: none is.
        quality: of JPEGs that are written anew: all photos, or, with `shorter_side`, those that are made smaller; None:
            none is, or 95.
        verify: whether each photo is decoded as a whole beforehand.
    """

    per_shard: int = 1000
    shuffled: bool = False
    seed: int = 0
    shorter_side: int | None = None
    quality: int | None = None
    verify: bool = False


def pack(
    source: Source, split: str, to: Path, how: Packing, threads: int, progress: Callable[[int], None]
) -> list[Damaged]:
    """Packs one split into TO/SPLIT/SPLIT-000000.tar and so on, and looks their samples up.

    Args:
        source: of the photos.
        split: its name.
        to: a folder, empty or of an earlier run of the same packing, whose shards stay.
        how: it is done.
        threads: shards at a time.
        progress: told the number of photos that are done; by any thread.

    Returns:
        Photos that are left out, as they cannot be read.

    Raises:
        DataError: the folder holds something else, or shards do not hold what they should.
        OSError: it cannot be written to.
    """
    silence()
    folder = to / split
    folder.mkdir(parents=True, exist_ok=True)
    _begin(folder, {**asdict(how), "samples": len(source), "names": source.digest(), "classes": list(source.classes)})
    ids = order.epoch_order(how.seed, 0, len(source)) if how.shuffled else np.arange(len(source))
    shards = [
        (folder / f"{split}-{number:06d}.tar", ids[begin : begin + how.per_shard])
        for number, begin in enumerate(range(0, len(ids), how.per_shard))
    ]
    stopped = threading.Event()
    left: list[Damaged] = []
    with ThreadPoolExecutor(threads, thread_name_prefix="cohort-packing") as pool:
        futures = [pool.submit(_shard, path, mine, source, split, how, progress, stopped) for path, mine in shards]
        try:
            for future in futures:
                left += future.result()
        except BaseException:
            stopped.set()
            pool.shutdown(cancel_futures=True)
            raise
    found = index([path for path, _ in shards], to, None, f"tar-{split}")
    if len(found.names) != len(source) - len(left):
        raise DataError(f"{folder}: expected {len(source) - len(left)} samples in the shards, found {len(found.names)}")
    return left


def _begin(folder: Path, plan: dict[str, Any]) -> None:
    path = folder / _PLAN
    if path.is_file():
        before = json.loads(path.read_text(encoding="utf-8"))
        if before != plan:
            key = next(key for key in plan if before.get(key) != plan[key])
            raise DataError(
                f"{folder}: was begun with another {key}: expected an empty folder, or the same photos and options as "
                "before"
            )
    elif any(folder.iterdir()):
        raise DataError(f"{folder}: expected an empty folder, or one that this command has begun")
    else:
        with caching.aside(path) as file:
            file.write(json.dumps(plan, indent=1).encode())


class _StoppedError(Exception):
    pass


def _shard(
    path: Path,
    ids: NDArray[np.int64],
    source: Source,
    split: str,
    how: Packing,
    progress: Callable[[int], None],
    stopped: threading.Event,
) -> list[Damaged]:
    told = path.with_suffix(".left_out.json")
    if path.is_file():
        progress(len(ids))
        return [Damaged(**each) for each in json.loads(told.read_text(encoding="utf-8"))] if told.is_file() else []
    left = []
    with caching.aside(path) as file, tarfile.open(fileobj=file, mode="w", format=tarfile.USTAR_FORMAT) as tar:
        for sample in ids.tolist():
            if stopped.is_set():
                raise _StoppedError
            try:
                suffix, content = _photo(source.read(sample), how)
            except UnreadableError as error:
                left.append(Damaged(split, source.place(sample), str(error)))
            else:
                label = int(source.labels[sample])
                place = source.place(sample).encode("utf-8", "backslashreplace").decode()
                about = {"label": label, "class": source.classes[label], "from": place}
                _add(tar, f"{sample:08d}", {suffix: content, "cls": str(label).encode(), "json": _json(about)})
            progress(1)
        if left:
            with caching.aside(told) as other:
                other.write(_json([asdict(each) for each in left]))
    return left


def _photo(content: bytes, how: Packing) -> tuple[str, bytes]:
    """The suffix and the bytes of a photo as it is packed. Raises: UnreadableError."""
    height, width = measured(content)
    side = how.shorter_side
    smaller = side is not None and min(height, width) > side
    anew = smaller or (side is None and how.quality is not None)
    if not anew:
        if how.verify:
            whole(content)
        with Image.open(io.BytesIO(content)) as header:
            return _SUFFIXES[str(header.format)], content
    image = Image.fromarray(whole(content).permute(1, 2, 0).numpy())
    if side is not None and smaller:
        # The longer side is rounded down, as torchvision's Resize does.
        scaled = (side, side * height // width) if width <= height else (side * width // height, side)
        image = image.resize(scaled, Image.Resampling.BICUBIC)
    buffer = io.BytesIO()
    image.save(buffer, "JPEG", quality=how.quality or 95)
    return "jpg", buffer.getvalue()


def _add(tar: tarfile.TarFile, key: str, members: dict[str, bytes]) -> None:
    for suffix, content in members.items():
        info = tarfile.TarInfo(f"{key}.{suffix}")
        info.size = len(content)
        tar.addfile(info, io.BytesIO(content))


def _json(value: Any) -> bytes:
    return json.dumps(value).encode()


def write_classes(path: Path, classes: Sequence[str]) -> None:
    """The classes in the order of their labels, a line each. Raises: DataError, where a name is more than a line."""
    for name in classes:
        if name != name.strip() or len(name.splitlines()) != 1:
            raise DataError(f"classes: expected names of one line, found {name!r}")
    with caching.aside(path) as file:
        file.write("".join(f"{name}\n" for name in classes).encode("utf-8", "surrogateescape"))

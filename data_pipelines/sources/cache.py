"""Where listings and indices are kept from start to start, and how they are read and written."""

import contextlib
import hashlib
import os
import tempfile
import zipfile
import zlib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from data_pipelines.damage import DataError

_OWN = ".cohort"


def folders(root: Path, cache: Path | None) -> list[Path]:
    """Where what is known of a data set may lie, the best place first.

    Args:
        root: of the data set.
        cache: what `data.cache` says, ~ expanded; None: beside the data, or in the user's own cache where nothing can
            be written there.
    """
    where = root.resolve()
    name = f"{where.name}-{hashlib.sha256(os.fsencode(where)).hexdigest()[:12]}"
    if cache is not None:
        return [cache / name]
    home = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    beside = where if where.is_dir() else where.parent
    return [beside / _OWN, home / "cohort" / name]


def writable(root: Path, cache: Path | None) -> Path:
    """The first of these folders that can be written to, made if need be.

    Raises:
        DataError: there is none.
    """
    wanted = folders(root, cache)
    for folder in wanted:
        with contextlib.suppress(OSError):
            folder.mkdir(parents=True, exist_ok=True)
            if os.access(folder, os.W_OK | os.X_OK):
                return folder
    raise DataError(
        f"cache: expected a folder that can be written to, found none: {', '.join(map(str, wanted))}; name one by "
        "data.cache"
    )


def load(path: Path) -> dict[str, np.ndarray] | None:
    """What `save` wrote; None where there is no such file, or another one."""
    try:
        with path.open("rb") as file:
            found = np.load(file, allow_pickle=False)
            return dict(found) if isinstance(found, np.lib.npyio.NpzFile) else None
    except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile, zlib.error):
        return None


def save(path: Path, arrays: Mapping[str, np.ndarray]) -> None:
    """Writes aside, syncs, renames. Raises: OSError."""
    with aside(path) as file:
        np.savez(file, **arrays)  # type: ignore[arg-type]


@contextlib.contextmanager
def aside(path: Path) -> Iterator[Any]:
    """A file to write to, which takes its place once it is whole, and is gone if it is not to be. Processes that write
    the same at once do not meet."""
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.", suffix=".tmp")
    try:
        with os.fdopen(handle, "wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.chmod(name, 0o644)
        os.replace(name, path)
    except BaseException:
        with contextlib.suppress(OSError):
            os.unlink(name)
        raise


def bar(total: int, what: str, unit: str) -> tqdm:
    """Shows how far a long look at a data set is: in a terminal, after two seconds, once a machine."""
    first = os.environ.get("LOCAL_RANK", "0") == "0"
    return tqdm(total=total, desc=what, unit=f" {unit}", delay=2, leave=False, disable=None if first else True)

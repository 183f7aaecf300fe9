"""Files that are there whole or not at all."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import stat
from datetime import datetime
from pathlib import Path
from typing import Any, BinaryIO


def open_to_read(path: Path) -> BinaryIO:
    """Opens a regular file, and neither waits at a pipe or a device nor follows a link in its place.

    Raises:
        OSError: with the path; it is something else, or cannot be opened.
    """
    descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise OSError(errno.EINVAL, "not a file", str(path))
    return os.fdopen(descriptor, "rb")


def read_bytes(path: Path) -> bytes:
    """All of a regular file. Raises: OSError, as `open_to_read`."""
    with open_to_read(path) as file:
        return file.read()


def sync(path: Path) -> None:
    """Has the disk keep a file or the entries of a folder."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_bytes(path: Path, content: bytes) -> None:
    """Writes aside, syncs, renames: a reader finds the old file or the new one."""
    aside = path.with_name(path.name + ".tmp")
    aside.write_bytes(content)
    sync(aside)
    aside.replace(path)
    sync(path.parent)


def write_text(path: Path, text: str) -> None:
    """As `write_bytes`."""
    write_bytes(path, text.encode())


def write_json(path: Path, value: Any) -> None:
    """As `write_text`."""
    write_text(path, json.dumps(value, indent=2) + "\n")


def digest(path: Path) -> dict[str, int | str]:
    """Size in bytes and SHA-256 of a file."""
    sha = hashlib.sha256()
    with open_to_read(path) as file:
        while block := file.read(1 << 20):
            sha.update(block)
    return {"size": path.stat().st_size, "sha256": sha.hexdigest()}


def move_aside(folder: Path) -> Path:
    """Gives a folder a name with the time in it. Returns: its new path."""
    aside = folder.with_name(f"{folder.name}.{datetime.now():%Y%m%d-%H%M%S-%f}")
    folder.rename(aside)
    return aside

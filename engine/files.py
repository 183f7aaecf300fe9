"""Files that are there whole or not at all, and are files: whatever else stands in their place is refused."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import stat
from datetime import datetime
from pathlib import Path
from typing import Any, BinaryIO


def opener(path: str, flags: int) -> int:
    """For `open`: a regular file, or nothing. It neither waits at a pipe or a device nor follows a link.

    Raises:
        OSError: with the path; it is something else, or cannot be opened.
    """
    descriptor = os.open(path, flags | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC, 0o666)
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise OSError(errno.EINVAL, "not a file", path)
    return descriptor


def open_to_read(path: Path) -> BinaryIO:
    """A regular file. Raises: OSError, as `opener`."""
    return open(path, "rb", opener=opener)


def read_bytes(path: Path) -> bytes:
    """All of a regular file. Raises: OSError, as `opener`."""
    with open_to_read(path) as file:
        return file.read()


def read_text(path: Path) -> str:
    """As `read_bytes`. Raises: UnicodeDecodeError."""
    return read_bytes(path).decode()


def sync(path: Path) -> None:
    """Has the disk keep a file or the entries of a folder."""
    descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_bytes(path: Path, content: bytes) -> None:
    """Writes aside, syncs, renames: a reader finds the old file or the new one."""
    aside = path.with_name(path.name + ".tmp")
    with open(aside, "wb", opener=opener) as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())
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

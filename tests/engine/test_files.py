"""What is no file, in the place of one: a pipe, a device, a link."""

from __future__ import annotations

import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from engine import files

NO_FILES: dict[str, Callable[[Path, Path], Any]] = {
    "pipe": lambda path, other: os.mkfifo(path),
    "link": lambda path, other: path.symlink_to(other),
    "dangling_link": lambda path, other: path.symlink_to(other.with_name("nowhere")),
    "loop": lambda path, other: path.symlink_to(path),
    "folder": lambda path, other: path.mkdir(),
}

USES: dict[str, Callable[[Path], Any]] = {
    "read": files.read_bytes,
    "digest": files.digest,
    "append": lambda path: files.opener(str(path), os.O_WRONLY | os.O_CREAT | os.O_APPEND),
    "write": lambda path: files.opener(str(path), os.O_WRONLY | os.O_CREAT | os.O_TRUNC),
}


@pytest.mark.parametrize("use", USES)
@pytest.mark.parametrize("kind", NO_FILES)
def test_what_is_no_file_is_refused_at_once_and_what_it_points_to_stays(tmp_path: Path, kind: str, use: str) -> None:
    path, other = tmp_path / "name", tmp_path / "other"
    other.write_text("a secret")
    NO_FILES[kind](path, other)
    with pytest.raises(OSError, match=re.escape(str(path))):
        USES[use](path)
    assert other.read_text() == "a secret"
    assert sorted(tmp_path.iterdir()) == [path, other]


def test_a_device_is_refused() -> None:
    for use in USES.values():
        with pytest.raises(OSError, match=r"not a file: '/dev/zero'"):
            use(Path("/dev/zero"))


@pytest.mark.parametrize("kind", ["link", "loop", "dangling_link", "pipe"])
def test_a_file_takes_the_place_of_what_is_none(tmp_path: Path, kind: str) -> None:
    path, other = tmp_path / "name", tmp_path / "other"
    other.write_text("a secret")
    NO_FILES[kind](path, other)
    files.write_text(path, "whole")
    assert not path.is_symlink()
    assert (path.read_text(), other.read_text()) == ("whole", "a secret")


def test_what_is_written_aside_is_not_written_through_a_link(tmp_path: Path) -> None:
    other = tmp_path / "other"
    other.write_text("a secret")
    (tmp_path / "name.tmp").symlink_to(other)
    with pytest.raises(OSError, match=r"name\.tmp"):
        files.write_text(tmp_path / "name", "whole")
    assert other.read_text() == "a secret"

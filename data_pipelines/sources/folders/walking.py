"""Which files of a folder are images of it."""

import os
from collections import Counter
from dataclasses import dataclass
from operator import attrgetter
from pathlib import Path
from typing import Literal

from data_pipelines.damage import DataError

EXTENSIONS = (".jpg", ".jpeg", ".png", ".ppm", ".bmp", ".pgm", ".tif", ".tiff", ".webp")
"""Those that torchvision's ImageFolder takes; what is in a file is seen when it is read."""

Links = Literal["inside", "anywhere"]
"""Where links may lead: to places inside the folder of the data set, or anywhere."""


@dataclass(frozen=True)
class Walk:
    """What is in a folder and in the folders within.

    Attributes:
        names: paths of the images within the folder, those that lie in it first, then those of each folder within, in
            order: as torchvision's ImageFolder.
        visited: the paths of all folders that were looked into, "." for itself, and when each was last changed, in ns.
        left: how many entries are no images, by the reason.
    """

    names: list[str]
    visited: list[tuple[str, int]]
    left: Counter[str]


def walk(folder: Path, root: Path, links: Links, *, nested: bool) -> Walk:
    """Looks for images.

    Args:
        folder: where.
        root: that links may not leave.
        links: unless they may.
        nested: whether folders within are looked into.

    Raises:
        DataError: a link leads out of the root, to nothing, or into a folder that it lies in.
    """
    found = Walk([], [], Counter())
    _walk(folder, "", root, links, nested, found, (os.path.realpath(folder),))
    if len(found.visited) > 1:  # Those of one folder are in order.
        found.names.sort(key=lambda name: (os.path.dirname(name), name))
    return found


def _walk(
    folder: Path, within: str, root: Path, links: Links, nested: bool, found: Walk, above: tuple[str, ...]
) -> None:
    found.visited.append((within.rstrip("/") or ".", changed(folder)))
    further = []
    for entry in entries(folder, root, links, found.left):
        if entry.is_dir():
            if nested:
                further.append(entry)
            else:
                found.left["folders"] += 1
        elif not entry.name.lower().endswith(EXTENSIONS):
            found.left["files that are no images by their names"] += 1
        elif entry.is_file():
            found.names.append(within + entry.name)
        else:
            found.left["files that are neither files nor folders"] += 1
    for entry in further:
        real = os.path.realpath(entry.path) if entry.is_symlink() else os.path.join(above[-1], entry.name)
        if real in above:
            raise DataError(f"{entry.path}: expected a folder, found a link to {real}, in which it lies")
        _walk(Path(entry.path), f"{within}{entry.name}/", root, links, nested, found, (*above, real))


def changed(folder: Path) -> int:
    """When entries of a folder last came or went, in ns."""
    return os.stat(folder).st_mtime_ns


def entries(folder: Path, root: Path, links: Links, left: Counter[str]) -> list[os.DirEntry[str]]:
    """What is in a folder, sorted by name, less what is hidden, which is counted. Raises: DataError, as `walk`."""
    with os.scandir(folder) as scanned:
        found = sorted(scanned, key=attrgetter("name"))
    shown = [entry for entry in found if not entry.name.startswith(".")]
    if len(shown) < len(found):
        hidden = (entry.name for entry in found if entry.name.startswith("."))
        left["hidden files and folders"] += sum(name != ".cohort" for name in hidden)
    for entry in shown:
        # Only links are resolved: a directory entry knows that it is one without a visit to the disk.
        if entry.is_symlink():
            require_allowed(Path(entry.path), root, links)
    return shown


def require_allowed(path: Path, root: Path, links: Links) -> None:
    """Raises: DataError, where a path is a link to where it may not lead."""
    target = path.resolve()
    if links == "inside" and not target.is_relative_to(root.resolve()):
        raise DataError(
            f"{path}: expected a file or folder inside {root}, found a link to {target}. Copy it, link inside, or "
            "allow it by data.links=anywhere"
        )
    if not target.exists():
        raise DataError(f"{path}: expected a file or folder, found a link to {target}, which does not exist.")

"""Files that say what the classes are called, and of which class an image is."""

import difflib
import re
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from data_pipelines.damage import DataError

_WNID = re.compile(r"n\d{8}\b")
"""A synset of WordNet, as ImageNet's classes are called."""

_HEADER = re.compile(r"imageid\b|filename\b|image\b", re.IGNORECASE)


def read_classes(path: Path) -> tuple[str, ...]:
    """The classes in the order of the labels: a line each. Of lines that begin with a synset, such as "n01440764 tench,
    Tinca tinca", that alone is the class's name.

    Raises:
        DataError: the file cannot be read, holds no line, or a class twice.
    """
    lines = [line.strip() for line in _lines("classes", path) if line.strip()]
    if lines and all(_WNID.match(line) for line in lines):
        lines = [line[:9] for line in lines]
    if not lines:
        raise DataError(f"classes: {path}: expected a line for each class, found none")
    places: dict[str, int] = {}
    for number, line in enumerate(lines, 1):
        if line in places:
            raise DataError(
                f"classes: {path}: expected each class once, found {line!r} in lines {places[line]} and {number}"
            )
        places[line] = number
    return tuple(lines)


def ordered(found: Sequence[str], classes: Sequence[str], path: Path, where: str) -> NDArray[np.int64]:
    """The places of the classes that were found in those that a file lists.

    Raises:
        DataError: one is not among them; names it and the nearest.
    """
    places = {name: place for place, name in enumerate(classes)}
    for name in found:
        if name not in places:
            near = difflib.get_close_matches(name, classes, n=1)
            hint = f"; did you mean {near[0]!r}?" if near else ""
            raise DataError(f"classes: {path} does not list {name!r}, which is a class of {where}{hint}")
    return np.array([places[name] for name in found], np.int64)


def read_labels(path: Path, names: Sequence[str], classes: Sequence[str] | None, *, listed: bool) -> list[str]:
    """Of which class each image is.

    Either a line for each image, "FILE CLASS" or "FILE,CLASS ..." in any order; or lines with nothing but the class,
    one for each image in the order of their names. A class is a name; or a number: beside a file's name its place in
    the classes from 0 on, as Caffe's lists have it, and alone ILSVRC's own, from 1 on, which stands for a line of
    `data.classes`.

    Args:
        path: the file.
        names: of the images, sorted.
        classes: known ones, in the order of labels; None if nobody has said.
        listed: whether `data.classes` lists them.

    Returns:
        The class of each image, in their order.

    Raises:
        DataError: an image has no line, or a line no class.
    """
    lines = [line.strip() for line in _lines("val_labels", path) if line.strip()]
    if lines and _HEADER.match(lines[0]):
        lines = lines[1:]
    pairs = [re.split(r"[,\s]+", line) for line in lines]
    if pairs and all(len(pair) == 1 for pair in pairs):
        if len(pairs) != len(names):
            raise DataError(
                f"val_labels: {path}: expected a line for each of {len(names)} images, found {len(pairs)} lines"
            )
        given = dict(zip(names, (pair[0] for pair in pairs), strict=True))
        numbered, first = all(pair[0].isdecimal() for pair in pairs), 1
        if numbered and not listed and not set(given.values()) <= set(classes or ()):
            raise DataError(
                f"val_labels: {path}: its numbers are ILSVRC's own, whose order is not that of the names; expected "
                "data.classes, a file that lists the classes in that order, or a file with names of classes"
            )
    else:
        given = {pair[0].rsplit("/", 1)[-1]: pair[1] for pair in pairs if len(pair) > 1}
        given |= {f"{name}.JPEG": value for name, value in given.items() if "." not in name}
        numbered, first = bool(pairs) and all(value.isdecimal() for value in given.values()), 0
    numbered = numbered and classes is not None and not set(given.values()) <= set(classes)
    return [_class_of(name, given, path, classes if numbered else None, first) for name in names]


def _class_of(name: str, given: Mapping[str, str], path: Path, classes: Sequence[str] | None, first: int) -> str:
    if name not in given:
        raise DataError(f"val_labels: {path} has no line for {name}")
    value = given[name]
    if classes is None:
        return value
    if not first <= int(value) < first + len(classes):
        raise DataError(
            f"val_labels: {path}: expected classes {first} to {first + len(classes) - 1}, as there are {len(classes)}, "
            f"found {value} for {name}"
        )
    return classes[int(value) - first]


def _lines(key: str, path: Path) -> list[str]:
    try:
        return path.read_text(encoding="utf-8").splitlines()
    except OSError as error:
        raise DataError(f"{key}: {path}: cannot be read: {error.strerror or error}") from None
    except UnicodeDecodeError:
        raise DataError(f"{key}: {path}: expected a text file, found another") from None

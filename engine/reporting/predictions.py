"""Predictions as files: of every image, the accuracy of each class, and which class was taken for which."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from data_pipelines import Pipeline
from engine.config import RunConfig
from engine.files import write_text
from engine.training.predictions import Predictions

Kept = Mapping[str, Predictions]
"""Of each set of networks: `val`, and `ema` where there are averages."""


def write_images(
    path: Path, kept: Kept, networks: Sequence[str], classes: Sequence[str] | None, path_of: Callable[[int], str | None]
) -> None:
    """A line for each image: its id, file and label, and what each network named, and with which probability.

    Args:
        path: .csv for a table, .jsonl for an object a line. Labels are names of classes where they have some.
        kept: the predictions.
        networks: names of the rows of each.
        classes: the names of the classes.
        path_of: the file of an image, by its id.
    """
    keys = [f"{prefix}/{name}/{what}" for prefix in kept for name in networks for what in ("predicted", "probability")]
    columns = ["id", "path", "label", *keys]
    _write(path, columns, _images(kept, classes, path_of))


def write_classes(path: Path, kept: Kept, networks: Sequence[str], classes: Sequence[str] | None, count: int) -> None:
    """A line for each class: how many images could be read, and what % of them each network named right.

    Args:
        path: .csv or .jsonl.
        kept: the predictions.
        networks: names of the rows of each.
        classes: the names of the `count` classes.
    """
    tables = {
        f"{prefix}/{name}/top1": found.confusion(row, count)
        for prefix, found in kept.items()
        for row, name in enumerate(networks)
    }
    images = next(iter(tables.values())).sum(1).tolist()
    right = [table.diagonal().tolist() for table in tables.values()]
    rows = (
        [_label(each, classes), of, *(100 * those[each] / of if of else None for those in right)]
        for each, of in enumerate(images)
    )
    _write(path, ["class", "images", *tables], rows)


def write_confusion(path: Path, kept: Kept, networks: Sequence[str], classes: Sequence[str] | None, count: int) -> None:
    """A line for each pair of classes that some network met: how many images of the one were taken for the other.

    Args:
        path: .csv or .jsonl.
        kept: the predictions.
        networks: names of the rows of each.
        classes: the names of the `count` classes.
    """

    def rows() -> Iterator[list[Any]]:
        for prefix, found in kept.items():
            for row, name in enumerate(networks):
                table = found.confusion(row, count)
                for label, named in table.nonzero().tolist():
                    images = int(table[label, named])
                    yield [f"{prefix}/{name}", _label(label, classes), _label(named, classes), images]

    _write(path, ["network", "class", "predicted", "images"], rows())


def write_tables(config: RunConfig, kept: Kept, pipeline: Pipeline, say: Callable[[str], None]) -> None:
    """What `evaluation.per_class` and `evaluation.confusion` ask for, into the run's folder, as far as the disk takes
    it."""
    about = [*(name for name, _ in config.trained), "ensemble"], pipeline.class_names, pipeline.num_classes
    tables = {"per_class": write_classes, "confusion": write_confusion}
    for name, write in tables.items():
        path = config.folder / f"{name}.csv"
        try:
            if getattr(config.evaluation, name):
                write(path, kept, *about)
        except OSError as error:
            say(f"{path}: {error.strerror or error}; training goes on")


def _images(kept: Kept, classes: Sequence[str] | None, path_of: Callable[[int], str | None]) -> Iterator[Sequence[Any]]:
    sets = list(kept.values())
    targets = sets[0].targets.tolist()
    named = [row for found in sets for row in found.named.tolist()]
    probability = [row for found in sets for row in found.probability.tolist()]
    for index, target in enumerate(targets):
        if target < 0:  # What was shown in its place tells nothing.
            yield [index, path_of(index), None, *[None] * (2 * len(named))]
            continue
        given = ((_label(names[index], classes), of[index]) for names, of in zip(named, probability, strict=True))
        yield [index, path_of(index), _label(target, classes), *(value for pair in given for value in pair)]


def _label(index: int, classes: Sequence[str] | None) -> str | int:
    return classes[index] if classes else index


def _write(path: Path, columns: Sequence[str], rows: Iterator[Sequence[Any]]) -> None:
    text = io.StringIO()
    if path.suffix == ".jsonl":
        text.writelines(json.dumps(dict(zip(columns, row, strict=True))) + "\n" for row in rows)
    else:
        table = csv.writer(text, lineterminator="\n")
        table.writerow(columns)
        table.writerows(rows)
    write_text(path, text.getvalue())

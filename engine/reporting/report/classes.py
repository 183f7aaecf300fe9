"""What runs have left about single classes, see `evaluation.per_class` and `evaluation.confusion`."""

from __future__ import annotations

import csv
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

from engine.files import opener
from engine.reporting.report.comparing import Group, Row

MOST = 15
"""Pairs of classes that are listed."""


def per_class(group: Group) -> Iterator[tuple[str, ...]]:
    """(class, mean top-1 in percent of the learning peers over the runs of each row); nothing where no run has it."""
    found: list[dict[str, list[float]]] = []
    for row in group.rows:
        values: dict[str, list[float]] = {}
        for run in row.finished:
            for line in _read(run.folder / "per_class.csv"):
                for name in run.config.learners:
                    if text := line.get(f"val/{name}/top1"):
                        values.setdefault(line["class"], []).append(float(text))
        found.append(values)
    for name in dict.fromkeys(name for values in found for name in values):
        means = (values.get(name) for values in found)
        yield (name, *(f"{sum(those) / len(those):.1f}" if those else "–" for those in means))


def confusions(group: Group) -> Iterator[tuple[str, ...]]:
    """(class, what it was taken for, images of a peer and run in each row), the most frequent first."""
    counts = [_confused(row) for row in group.rows]
    total = {pair: sum(each.get(pair, 0.0) for each in counts) for each in counts for pair in each}
    for pair in sorted(total, key=total.__getitem__, reverse=True)[:MOST]:
        yield (*pair, *(f"{each.get(pair, 0.0):.1f}" if each else "–" for each in counts))


def _confused(row: Row) -> dict[tuple[str, str], float]:
    images: Counter[tuple[str, str]] = Counter()
    networks = 0
    for run in row.finished:
        lines = _read(run.folder / "confusion.csv")
        networks += len(run.config.learners) * bool(lines)
        for line in lines:
            if line["network"].removeprefix("val/") in run.config.learners and line["class"] != line["predicted"]:
                images[line["class"], line["predicted"]] += int(line["images"])
    return {pair: count / networks for pair, count in images.items()}


def _read(path: Path) -> list[dict[str, str]]:
    try:
        with open(path, encoding="utf-8", newline="", opener=opener) as file:
            return list(csv.DictReader(file))
    except OSError:
        return []

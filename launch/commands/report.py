"""What launch/report.py does, once its words are read."""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from pathlib import Path

from engine.config import ConfigError
from engine.files import write_text
from engine.reporting.report.comparing import Group, compare
from engine.reporting.report.curves import curves
from engine.reporting.report.figures import picture
from engine.reporting.report.page import as_html, as_text
from engine.reporting.report.runs import Labels, Run, read_run
from engine.reporting.report.table import table
from engine.reporting.report.tables import as_csv
from launch.entry import user_errors
from launch.sweeping.cells import read_sweep

FEW = 4
"""Runs whose curves are told apart peer by peer in one picture, where no seeds are compared."""


def run(options: argparse.Namespace) -> None:
    """Reads the runs, and writes what they came to."""
    with user_errors():
        first = options.runs[0]
        sweep = read_sweep(first)
        out = options.out or (first / "report" if len(options.runs) == 1 else None)
        if out is None:
            raise ConfigError("--out is missing; expected the path of the files, without suffix")
        runs = list({run.folder.resolve(): run for folder in options.runs for run in _runs_in(folder)}.values())
        groups = compare(runs, options.may_differ)
        _write(out, options.title or sweep.name or out.name, sweep.about, runs, groups)


def _runs_in(folder: Path) -> Iterator[Run]:
    """The run in a folder, or those of the sweep in it that have been evaluated."""
    sweep = read_sweep(folder)
    if not sweep.cells:
        yield read_run(folder)
        return
    found = 0
    for name, cell in sweep.cells.items():
        labels = Labels(cell["method"], cell["network"], cell["override"], tuple(cell["meant"]))
        try:
            run = read_run(folder / name, labels)
        except FileNotFoundError:
            continue
        found += 1
        yield run
    if not found:
        raise FileNotFoundError(f"{folder}: no run of this sweep has been evaluated yet")


def _write(out: Path, title: str, about: str, runs: list[Run], groups: list[Group]) -> None:
    out.parent.mkdir(parents=True, exist_ok=True)
    folders = [run.folder for run in runs]
    text = table(folders)
    write_text(out.with_name(out.name + ".txt"), text + "\n")
    write_text(out.with_name(out.name + ".md"), as_text(title, about, groups))
    write_text(out.with_name(out.name + ".csv"), as_csv(groups))
    image, page = out.with_name(out.name + ".png"), out.with_name(out.name + ".html")
    if len(runs) <= FEW and all(len(row.runs) == 1 for group in groups for row in group.rows):
        curves(folders, image)
    else:
        picture(groups, image)
    write_text(page, as_html(title, about, groups))
    listed = "\n".join(f"{folder}" for folder in folders)
    print(f"{text}\n\npage: {page}\npicture: {image}\nruns:\n{listed}")

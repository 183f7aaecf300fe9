"""What a run, or several side by side, came to, as a table to read."""

from __future__ import annotations

import operator
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from engine.config import RunConfig
from engine.config.loading import load_run
from engine.reporting.tracking import read_metrics


def table(runs: Sequence[Path]) -> str:
    """Validation top-1, top-5 and loss at the last evaluation, and the best top-1, of every peer and of the ensemble.

    Raises:
        FileNotFoundError: a folder holds no run with an evaluation.
    """
    header = ("run", "method", "network", "top-1 %", "top-5 %", "loss", "best top-1 %", "at epoch")
    rows: list[tuple[str, ...]] = []
    notes = []
    found = {run: evaluations(run) for run in runs}
    titles = titles_of(runs)
    for run in runs:
        lines, config, title = found[run], load_run(run), titles[run]
        names = [name for name, _ in config.trained]
        learners = config.learners
        for prefix in ("val", "ema"):
            for name in (*names, "ensemble"):
                key = f"{prefix}/{name}"
                frozen = name in names and name not in learners
                if f"{key}/top1" not in lines[-1] or (frozen and prefix == "ema"):
                    continue
                best = max(lines, key=operator.itemgetter(f"{key}/top1"))
                shown = name if prefix == "val" else f"{name} (average)"
                shown += " (frozen)" * frozen
                last = [f"{lines[-1][f'{key}/{part}']:.2f}" for part in ("top1", "top5")]
                # A loss that is not finite is null in metrics.jsonl.
                loss = "-" if lines[-1][f"{key}/loss"] is None else f"{lines[-1][f'{key}/loss']:.3f}"
                rows.append(
                    (
                        title,
                        config.method.name,
                        shown,
                        *last,
                        loss,
                        f"{best[f'{key}/top1']:.2f}",
                        f"{best['epoch']:g}",
                    )
                )
        if len(names) > 1:
            notes.append(f"{title}: deployed: {deployed(config, lines[-1])}")
            mean = sum(lines[-1][f"val/{name}/top1"] for name in learners) / len(learners)
            disagreement = lines[-1]["val/disagreement"]
            notes.append(f"{title}: the peers' mean top-1 is {mean:.2f} %; two peers disagree on {disagreement:.2f} %")
    widths = [max(len(row[i]) for row in (header, *rows)) for i in range(len(header))]
    lines_out = [
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip()
        for row in (header, *rows)
    ]
    rule = "  ".join("-" * width for width in widths)
    return "\n".join([lines_out[0], rule, *lines_out[1:], "", *notes]).rstrip()


def titles_of(runs: Sequence[Path]) -> dict[Path, str]:
    """What each run is called: by its name, or where two have the same by where it lies too."""
    names = {run: load_run(run).title for run in runs}
    alike = [run for run in names if list(names.values()).count(names[run]) > 1]
    parts = [run.resolve().parts for run in alike]
    shared = next((i for i, column in enumerate(zip(*parts, strict=False)) if len(set(column)) > 1), 0)
    return names | {run: f"{names[run]} ({'/'.join(run.resolve().parts[shared:])})" for run in alike}


def deployed(config: RunConfig, scores: Mapping[str, Any]) -> str:
    """Whose accuracy stands for the run (`report.deployed`), and what it is at an evaluation."""
    who, top1 = deployed_network(config, scores)
    return f"{who}, top-1 {top1:.2f} %"


def deployed_network(config: RunConfig, scores: Mapping[str, Any]) -> tuple[str, float]:
    """Whose accuracy stands for the run, in words, and its top-1 in percent at an evaluation."""
    names = config.learners
    top1 = {name: scores[f"val/{name}/top1"] for name in names}
    if config.deployed == "mean":
        return "the mean of the peers", sum(top1.values()) / len(names)
    if config.deployed == "ensemble":
        return "the ensemble", scores["val/ensemble/top1"]
    if config.deployed == "ema":
        return f"the moving average of {names[0]}", scores[f"ema/{names[0]}/top1"]
    chosen = {"first": names[0], "leader": names[-1], "best": max(names, key=top1.__getitem__)}[config.deployed]
    return f"{chosen} ({config.deployed})", top1[chosen]


def evaluations(run: Path) -> list[dict[str, Any]]:
    """The lines of a run's metrics that hold an evaluation. Raises: FileNotFoundError, where there is none."""
    lines = [line for line in read_metrics(run) if "val/disagreement" in line]
    if not lines:
        raise FileNotFoundError(f"{run}: holds no evaluated run; expected a folder with config.yaml and metrics.jsonl")
    return lines

"""What a run, or several side by side, came to: a table to read and a picture to look at."""

from __future__ import annotations

import operator
from collections.abc import Sequence
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
    titles = _titles(runs)
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


def _titles(runs: Sequence[Path]) -> dict[Path, str]:
    """What each run is called: by its name, or where two have the same by where it lies too."""
    names = {run: load_run(run).title for run in runs}
    alike = [run for run in names if list(names.values()).count(names[run]) > 1]
    parts = [run.resolve().parts for run in alike]
    shared = next((i for i, column in enumerate(zip(*parts, strict=False)) if len(set(column)) > 1), 0)
    return names | {run: f"{names[run]} ({'/'.join(run.resolve().parts[shared:])})" for run in alike}


def deployed(config: RunConfig, scores: dict[str, Any]) -> str:
    """Whose accuracy stands for the run (`report.deployed`), and what it is at an evaluation."""
    names = config.learners
    top1 = {name: scores[f"val/{name}/top1"] for name in names}
    if config.deployed == "mean":
        return f"the mean of the peers, top-1 {sum(top1.values()) / len(names):.2f} %"
    if config.deployed == "ensemble":
        return f"the ensemble, top-1 {scores['val/ensemble/top1']:.2f} %"
    if config.deployed == "ema":
        return f"the moving average of {names[0]}, top-1 {scores[f'ema/{names[0]}/top1']:.2f} %"
    chosen = {"first": names[0], "leader": names[-1], "best": max(names, key=top1.__getitem__)}[config.deployed]
    return f"{chosen} ({config.deployed}), top-1 {top1[chosen]:.2f} %"


def evaluations(run: Path) -> list[dict[str, Any]]:
    """The lines of a run's metrics that hold an evaluation. Raises: FileNotFoundError, where there is none."""
    lines = [line for line in read_metrics(run) if "val/disagreement" in line]
    if not lines:
        raise FileNotFoundError(f"{run}: holds no evaluated run; expected a folder with config.yaml and metrics.jsonl")
    return lines


def curves(runs: Sequence[Path], path: Path) -> None:
    """Draws validation top-1, training loss and validation loss of every peer over the epochs into a PNG; moving
    averages and the ensemble too, where they are scored."""
    import matplotlib as mpl

    mpl.use("Agg")
    import matplotlib.pyplot as plt
    from matplotlib.ticker import MaxNLocator

    figure, (accuracy, trained, validated) = plt.subplots(1, 3, figsize=(18, 4.5), layout="constrained")
    colours = plt.rcParams["axes.prop_cycle"].by_key()["color"]
    for index, (run, title) in enumerate(_titles(runs).items()):
        scored, config = evaluations(run), load_run(run)
        lines = [line for line in read_metrics(run) if "lr" in line]
        for k, name in enumerate((*(name for name, _ in config.trained), "ensemble")):
            for prefix in ("val", "ema"):
                look = _look(colours[index % len(colours)], k, name, prefix)
                label = f"{title}: {name}{' (average)' if prefix == 'ema' else ''}"
                _draw(accuracy, scored, f"{prefix}/{name}/top1", label, look)
                _draw(validated, scored, f"{prefix}/{name}/loss", label, look)
            look = _look(colours[index % len(colours)], k, name, "train")
            _draw(trained, lines, f"train/{name}/ce", f"{title}: {name}", look)
    accuracy.set(ylabel="top-1 %", title="validation accuracy")
    trained.set(ylabel="cross-entropy", title="training loss")
    validated.set(ylabel="cross-entropy", title="validation loss")
    for axes in (accuracy, trained, validated):
        axes.set_xlabel("epoch")
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        axes.grid(alpha=0.3)
        if axes.lines:
            axes.legend(fontsize="small")
    figure.savefig(path, dpi=120)
    plt.close(figure)


def _look(colour: str, k: int, name: str, prefix: str) -> dict[str, Any]:
    if name == "ensemble":
        look: dict[str, Any] = {"linestyle": "-", "linewidth": 2.5, "alpha": 0.45}
    else:
        look = {"linestyle": ("-", "--", "-.", ":")[k % 4]}
    if prefix == "ema":
        look |= {"marker": ".", "markersize": 5, "linewidth": 0.8}
    return {"color": colour, **look}


def _draw(axes: Any, lines: Sequence[dict[str, Any]], key: str, label: str, look: dict[str, Any]) -> None:
    """What of the lines holds a finite number under the key, over the epochs."""
    points = [(line["epoch"], line[key]) for line in lines if line.get(key) is not None]
    if points:
        axes.plot([x for x, _ in points], [y for _, y in points], label=label, **look)

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
    for run in runs:
        lines, config = evaluations(run), load_run(run)
        names = [name for name, _ in config.trained]
        for prefix in ("val", "ema"):
            for name in (*names, "ensemble"):
                key = f"{prefix}/{name}"
                if f"{key}/top1" not in lines[-1]:
                    continue
                best = max(lines, key=operator.itemgetter(f"{key}/top1"))
                shown = name if prefix == "val" else f"{name} (average)"
                last = [f"{lines[-1][f'{key}/{part}']:.2f}" for part in ("top1", "top5")]
                # A loss that is not finite is null in metrics.jsonl.
                loss = "-" if lines[-1][f"{key}/loss"] is None else f"{lines[-1][f'{key}/loss']:.3f}"
                rows.append(
                    (
                        config.title,
                        config.method.name,
                        shown,
                        *last,
                        loss,
                        f"{best[f'{key}/top1']:.2f}",
                        f"{best['epoch']:g}",
                    )
                )
        if len(names) > 1:
            notes.append(f"{config.title}: deployed: {deployed(config, lines[-1])}")
            mean = sum(lines[-1][f"val/{name}/top1"] for name in names) / len(names)
            disagreement = lines[-1]["val/disagreement"]
            notes.append(
                f"{config.title}: the peers' mean top-1 is {mean:.2f} %; two peers disagree on {disagreement:.2f} %"
            )
    widths = [max(len(row[i]) for row in (header, *rows)) for i in range(len(header))]
    lines_out = [
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip()
        for row in (header, *rows)
    ]
    rule = "  ".join("-" * width for width in widths)
    return "\n".join([lines_out[0], rule, *lines_out[1:], "", *notes]).rstrip()


def deployed(config: RunConfig, scores: dict[str, Any]) -> str:
    """Whose accuracy stands for the run (`report.deployed`), and what it is at an evaluation."""
    names = [name for name, _ in config.trained]
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
    """Draws validation top-1 and training loss of every peer over the epochs into a PNG."""
    import matplotlib as mpl

    mpl.use("Agg")
    import matplotlib.pyplot as plt

    figure, (accuracy, loss) = plt.subplots(1, 2, figsize=(12, 4.5), layout="constrained")
    colours = plt.rcParams["axes.prop_cycle"].by_key()["color"]
    styles = ("-", "--", "-.", ":")
    for index, run in enumerate(runs):
        scored, config = evaluations(run), load_run(run)
        trained = [line for line in read_metrics(run) if "lr" in line]
        names = [name for name, _ in config.trained]
        colour = colours[index % len(colours)]
        for k, name in enumerate((*names, "ensemble")):
            label = f"{config.title}: {name}"
            look: dict[str, Any] = {"color": colour, "linestyle": styles[k % len(styles)]}
            if name == "ensemble":
                look |= {"linestyle": "-", "linewidth": 2.5, "alpha": 0.45}
            epochs = [line["epoch"] for line in scored]
            accuracy.plot(epochs, [line[f"val/{name}/top1"] for line in scored], label=label, **look)
            if name != "ensemble":
                key = f"train/{name}/ce"
                points = [(line["epoch"], line[key]) for line in trained if line.get(key) is not None]
                loss.plot([x for x, _ in points], [y for _, y in points], label=label, **look)
    accuracy.set(xlabel="epoch", ylabel="top-1 %", title="validation accuracy")
    loss.set(xlabel="epoch", ylabel="cross-entropy", title="training loss")
    for axes in (accuracy, loss):
        axes.grid(alpha=0.3)
        axes.legend(fontsize="small")
    figure.savefig(path, dpi=120)
    plt.close(figure)

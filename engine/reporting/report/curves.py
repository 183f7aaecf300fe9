"""The curves of a few runs, as one picture."""

from __future__ import annotations

import io
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from engine.config.loading import load_run
from engine.files import write_bytes
from engine.reporting.report.table import evaluations, titles_of
from engine.reporting.tracking import read_metrics


def curves(runs: Sequence[Path], path: Path) -> None:
    """Draws validation top-1, training loss and validation loss of every peer over the epochs into a PNG; moving
    averages and the ensemble too, where they are scored."""
    import matplotlib as mpl

    mpl.use("Agg")
    import matplotlib.pyplot as plt
    from matplotlib.ticker import MaxNLocator

    figure, (accuracy, trained, validated) = plt.subplots(1, 3, figsize=(18, 4.5), layout="constrained")
    colours = plt.rcParams["axes.prop_cycle"].by_key()["color"]
    for index, (run, title) in enumerate(titles_of(runs).items()):
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
    drawn = io.BytesIO()
    figure.savefig(drawn, dpi=120)
    write_bytes(path, drawn.getvalue())
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

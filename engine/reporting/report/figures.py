"""The pictures of a report: one axes each, so that they can be read on a telephone too."""

from __future__ import annotations

import io
import itertools
import math
import textwrap
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from engine.files import write_bytes
from engine.reporting.report.comparing import Group, Row
from engine.reporting.report.runs import Run

COLOURS = ("#6b7280", "#2563eb", "#d97706", "#059669", "#db2777", "#7c3aed", "#0891b2", "#b91c1c", "#65a30d", "#92400e")
"""Of the rows of a group, in their order; the first is grey."""

_STROKES = ("-", "--", ":", "-.")
"""Of the rows that have the first nine colours, the next nine, ..."""

_FEW = 5
"""Rows whose curves can be told apart where their deviations and names lie among them."""

_SCALED = ", on the scale of the second half of training"

_Points = list[tuple[float, float]]


def figures_of(group: Group) -> Iterator[tuple[str, str, str]]:
    """(title, what it shows in words, SVG) of each picture of a group."""
    for title, words, draw in _panels(group):
        yield title, words, _svg(draw)


def picture(groups: Sequence[Group], path: Path) -> None:
    """All pictures of a report as one PNG, a line for each group."""
    plt = _pyplot()
    lines = [(group, list(_panels(group))) for group in groups]
    columns = max(len(panels) for _, panels in lines)
    figure, axes = plt.subplots(
        len(lines), columns, figsize=(4.6 * columns, 3.4 * len(lines)), layout="constrained", squeeze=False
    )
    for row, (group, panels) in zip(axes, lines, strict=True):
        for each in row[len(panels) :]:
            each.set_axis_off()
        for each, (title, _, draw) in zip(row, panels, strict=False):
            draw(each)
            each.set_title(f"{group.title}\n{title}" if each is row[0] else title, fontsize="medium", loc="left")
    drawn = io.BytesIO()
    figure.savefig(drawn, dpi=120)
    write_bytes(path, drawn.getvalue())
    plt.close(figure)


def _panels(group: Group) -> Iterator[tuple[str, str, Callable[[Any], None]]]:
    gains = [row for row in group.rows if group.gain(row, "deployed", "last")]
    if gains:
        yield (
            "Gain over independent",
            "Points of top-1 that the deployed network has gained at the last epoch over the same trained alone, "
            "with the 95 % interval over paired seeds.",
            lambda axes: _draw_gains(axes, group, gains),
        )
    for title, ylabel, words, points in (
        ("Validation accuracy", "top-1 %", f"Top-1 of the deployed network over the epochs{_SCALED}.", _accuracy),
        ("Training loss", "cross-entropy", "Mean cross-entropy of the peers while they train.", _loss),
        ("Agreement", "% of images", f"Images on which two peers name the same class{_SCALED}.", _agreement),
    ):
        if any(points(run) for row in group.rows for run in row.runs):
            yield title, words, _curves_of(group, points, ylabel)


def _accuracy(run: Run) -> _Points:
    return [(s["epoch"], v) for s, v in zip(run.scores, run.measures()["deployed"], strict=True)]


def _loss(run: Run) -> _Points:
    keys = [f"train/{name}/ce" for name in run.config.learners]
    found = [(line["epoch"], [line[key] for key in keys if line.get(key) is not None]) for line in run.lines]
    return [(epoch, sum(values) / len(values)) for epoch, values in found if values]


def _agreement(run: Run) -> _Points:
    if len(run.config.trained) < 2:
        return []
    return [(scores["epoch"], 100 - scores["val/disagreement"]) for scores in run.scores]


def _curves_of(group: Group, points: Callable[[Run], _Points], ylabel: str) -> Callable[[Any], None]:
    def draw(axes: Any) -> None:
        few = len(group.rows) <= _FEW
        for row, (colour, stroke) in zip(group.rows, _looks(group), strict=True):
            _draw_row(axes, row, points, colour, stroke, band=few)
        if points is not _loss:
            _scale(axes)
        axes.set_xlabel("epoch")
        axes.set_ylabel(ylabel)
        axes.grid(alpha=0.25)
        if few:
            axes.legend(fontsize="small", frameon=False)
        else:
            # Beside the curves, in the order in which they end.
            drawn = [line for line in axes.lines if len(line.get_ydata())]
            drawn.sort(key=lambda line: -line.get_ydata()[-1])
            axes.legend(
                handles=drawn, fontsize=7, frameon=False, loc="upper left", bbox_to_anchor=(1, 1), labelspacing=0.2
            )

    return draw


def _scale(axes: Any) -> None:
    """Shows what the second half of training is about; dips of the first would flatten it."""
    half = max((x for line in axes.lines for x in line.get_xdata()), default=0) / 2
    late = [y for line in axes.lines for x, y in zip(line.get_xdata(), line.get_ydata(), strict=True) if x >= half]
    if late:
        room = 0.1 * (max(late) - min(late)) or 1.0
        axes.set_ylim(min(late) - room, max(late) + room)


def _draw_row(axes: Any, row: Row, points: Callable[[Run], _Points], colour: str, stroke: str, *, band: bool) -> None:
    """The mean over runs, and a band of a standard deviation to each side where there are several."""
    at: dict[float, list[float]] = {}
    for run in row.finished or row.runs:
        for x, y in points(run):
            if math.isfinite(y):
                at.setdefault(x, []).append(y)
    most = max((len(values) for values in at.values()), default=0)
    # Where some runs are not yet, a mean would jump.
    xs = sorted(x for x, values in at.items() if len(values) == most)
    means = [sum(at[x]) / most for x in xs]
    axes.plot(xs, means, stroke, color=colour, linewidth=1.6, label=row.method)
    if band and most > 1:
        widths = [math.sqrt(sum((y - m) ** 2 for y in at[x]) / (most - 1)) for x, m in zip(xs, means, strict=True)]
        low, high = ([m + side * w for m, w in zip(means, widths, strict=True)] for side in (-1, 1))
        axes.fill_between(xs, low, high, color=colour, alpha=0.15, linewidth=0)


def _draw_gains(axes: Any, group: Group, rows: Sequence[Row]) -> None:
    colours = {row.method: colour for row, (colour, _) in zip(group.rows, _looks(group), strict=True)}
    for place, row in enumerate(rows):
        gain = group.gain(row, "deployed", "last")
        assert gain is not None
        axes.errorbar(
            gain.mean, place, xerr=gain.half_width, fmt="o", color=colours[row.method], capsize=4, markersize=6
        )
    axes.axvline(0, color="#111827", linewidth=0.8)
    axes.set_yticks(range(len(rows)), [textwrap.fill(row.method, 18) for row in rows])
    axes.set_ylim(len(rows) - 0.5, -0.5)
    axes.set_xlabel("points of top-1")
    axes.grid(axis="x", alpha=0.25)


def _looks(group: Group) -> list[tuple[str, str]]:
    """Colour and stroke of each row. The baseline is grey."""
    others = itertools.cycle(itertools.product(_STROKES, COLOURS[1:]))
    looks = []
    for row in group.rows:
        stroke, colour = (_STROKES[0], COLOURS[0]) if row is group.baseline else next(others)
        looks.append((colour, stroke))
    return looks


def _svg(draw: Callable[[Any], None]) -> str:
    plt = _pyplot()
    with plt.rc_context({"svg.fonttype": "none", "font.family": "sans-serif", "svg.hashsalt": "report"}):
        figure, axes = plt.subplots(figsize=(4.4, 2.9), layout="constrained")
        for side in ("top", "right"):
            axes.spines[side].set_visible(False)
        draw(axes)
        text = io.StringIO()
        figure.savefig(text, format="svg", metadata={"Date": None})
        plt.close(figure)
    return text.getvalue()


def _pyplot() -> Any:
    import matplotlib as mpl

    mpl.use("Agg")
    import matplotlib.pyplot as plt

    return plt

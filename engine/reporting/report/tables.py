"""The tables of a report, as headings and rows of text that a page or a text file can show."""

from __future__ import annotations

import csv
import io
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from engine.reporting.report.classes import confusions, per_class
from engine.reporting.report.comparing import Group, Row
from engine.reporting.report.runs import When
from engine.reporting.report.statistics import Gain, Spread

NOTHING = "–"


@dataclass(frozen=True)
class Table:
    """One of a report."""

    title: str
    note: str
    header: tuple[str, ...]
    rows: Sequence[tuple[str, ...]]
    strong: frozenset[tuple[int, int]] = frozenset()
    """Cells (row, column) to be seen first."""


def tables_of(group: Group) -> Iterator[Table]:
    """The tables of a group of rows that may be compared."""
    yield _accuracy(group)
    if any(len(row.peers()) > 1 for row in group.rows):
        yield _peers(group)
    if any("val/ensemble/ece" in run.scores[-1] for row in group.rows for run in row.runs):
        yield _calibration(group)
    methods = [row.method for row in group.rows]
    if classes := list(per_class(group)):
        yield Table("Each class", "Top-1 in percent, the mean of peers and runs.", ("class", *methods), classes)
    if pairs := list(confusions(group)):
        note = "Validation images of a class that a peer takes for another one, the mean of peers and runs."
        yield Table("Confusions", note, ("class", "taken for", *methods), pairs)
    yield _cost(group)


def _accuracy(group: Group) -> Table:
    has_gain, has_figure = group.baseline is not None, any(row.published() for row in group.rows)
    # What is wanted first stands where a telephone shows it.
    header = ["method", "top-1 %, last epoch", *["gain over independent"] * has_gain, *["published"] * has_figure]
    means = any(run.config.deployed != "mean" for row in group.rows for run in row.runs)
    header += ["its best epoch", *["peers' mean, last"] * means, *(f"{kind}, last" for kind in group.kinds)]
    averages = any(row.spread("ema", "last") for row in group.rows)
    ensembles = any(row.spread("ensemble", "last") for row in group.rows)
    header += ["averages (EMA), last"] * averages + ["ensemble, last"] * ensembles + ["top-1 is of", "peers", "seeds"]
    rows: list[tuple[str, ...]] = []
    strong = set()
    for row in group.rows:
        cells = [row.method, spread(row, "deployed", "last")]
        if has_gain:
            gain = group.gain(row, "deployed", "last")
            cells.append("baseline" if row is group.baseline else shown_gain(gain))
            if gain and gain.is_clear:
                strong.add((len(rows), len(cells) - 1))
        cells += ["; ".join(dict.fromkeys(str(figure) for figure in row.published())) or NOTHING] * has_figure
        cells += [spread(row, "deployed", "best"), *[spread(row, "mean", "last")] * means]
        cells += [spread(row, kind, "last") for kind in group.kinds]
        cells += [spread(row, "ema", "last")] * averages + [spread(row, "ensemble", "last")] * ensembles
        seeds = f"{len(row.by_seed('mean', 'last'))}" + _unfinished(row)
        rows.append((*cells, row.runs[0].deployed.removeprefix("the "), str(len(row.runs[0].config.trained)), seeds))
    note = "Mean ± standard deviation over seeds, in percent."
    if has_gain:
        note += (
            " The gain is the mean of the differences between runs of one seed, with its 95 % interval (Student's t "
            "for paired differences); where that leaves out 0 it is set in bold."
        )
    note += " The best epoch is chosen on the validation images themselves, which flatters."
    return Table("Accuracy", note, tuple(header), rows, frozenset(strong))


def _unfinished(row: Row) -> str:
    left = len(row.runs) - len(row.finished)
    return f" ({left} not finished)" if left else ""


def _peers(group: Group) -> Table:
    rows = [
        (row.method, name, shown_spread(last), shown_spread(best))
        for row in group.rows
        for name, (last, best) in row.peers().items()
    ]
    note = "Top-1 in percent, mean ± standard deviation over seeds; each at its own best epoch."
    return Table("Each peer", note, ("method", "peer", "last epoch", "best epoch"), rows)


def _calibration(group: Group) -> Table:
    rows = []
    for row in group.rows:
        runs = row.finished or row.runs
        names = [*row.runs[0].config.learners, "ensemble"]
        keys = {"peers": names[:-1], "ensemble": names[-1:]}
        cells = []
        for members in keys.values():
            values = [
                100 * value
                for run in runs
                for name in members
                if (value := run.scores[-1].get(f"val/{name}/ece")) is not None
            ]
            cells.append(f"{sum(values) / len(values):.2f}" if values else NOTHING)
        rows.append((row.method, *cells))
    note = (
        "Expected calibration error in percent at the last epoch: how far the confidence in 15 bins of equal width "
        "lies from the accuracy there, weighted by images."
    )
    return Table("Calibration", note, ("method", "peers, mean", "ensemble"), rows)


def _cost(group: Group) -> Table:
    parts = [
        name
        for name in ("data", "forward", "exchange", "backward", "optimizer")
        if any(name in row.cost() for row in group.rows)
    ]
    costs = {id(row): row.cost() for row in group.rows}
    memory = any("peak_mib" in cost for cost in costs.values())
    base = costs[id(group.baseline)].get("step") if group.baseline else None
    rows = []
    for row in group.rows:
        cost = costs[id(row)]
        cells = [row.method, _number(cost.get("step"), 1)]
        cells += [_number(cost["step"] / base, 2) if base and "step" in cost else NOTHING] * bool(base)
        cells += [_number(cost.get(part), 1) for part in parts]
        cells += [_number(cost.get("peak_mib"), 0)] * memory
        ranks = sorted({str(run.starts[-1].get("ranks", "?")) for run in row.runs if run.starts})
        rows.append((*cells, ", ".join(ranks) or NOTHING))
    header = ("method", "step, ms", *["of independent's"] * bool(base), *parts, *["peak, MiB"] * memory, "ranks")
    note = (
        "Milliseconds of a training step and of its parts on rank 0: the median over lines of metrics, the mean over "
        "runs. They can be compared where the runs had the same machine to themselves."
    )
    return Table("Time and memory", note, header, rows)


def spread(row: Row, measure: str, when: When) -> str:
    """A measure of a row over its seeds, as text."""
    return shown_spread(row.spread(measure, when))


def shown_spread(found: Spread | None) -> str:
    """As 74.04 ± 0.07."""
    if found is None:
        return NOTHING
    return f"{found.mean:.2f}" if found.deviation is None else f"{found.mean:.2f} ± {found.deviation:.2f}"


def shown_gain(gain: Gain | None) -> str:
    """As +1.20 [+0.80, +1.60]."""
    if gain is None:
        return NOTHING
    if gain.half_width is None:
        return f"{gain.mean:+.2f} (one seed)"
    return f"{gain.mean:+.2f} [{gain.mean - gain.half_width:+.2f}, {gain.mean + gain.half_width:+.2f}]"


def _number(value: float | None, digits: int) -> str:
    return NOTHING if value is None else f"{value:,.{digits}f}"


def as_markdown(table: Table) -> str:
    """Title, note and table."""
    rows = [
        tuple(f"**{cell}**" if (i, j) in table.strong else cell for j, cell in enumerate(row))
        for i, row in enumerate(table.rows)
    ]
    lines = [_line(table.header), _line(["---"] * len(table.header)), *map(_line, rows)]
    return "\n".join([f"### {table.title}", "", table.note, "", *lines])


def _line(cells: Sequence[str]) -> str:
    return "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"


def as_csv(groups: Sequence[Group]) -> str:
    """One line for each run, network and measure: what the tables are made of."""
    text = io.StringIO()
    out = csv.writer(text, lineterminator="\n")
    out.writerow(("group", "method", "seed", "finished", "measure", "top1_last", "top1_best", "run"))
    for group in groups:
        for row in group.rows:
            for run in row.runs:
                values: dict[str, Any] = {**run.measures(), **{f"peer {n}": v for n, v in run.peers().items()}}
                for measure, found in values.items():
                    numbers = (f"{found[-1]:.4f}", f"{max(found):.4f}")
                    seed = run.config.seed
                    out.writerow((group.title, row.method, seed, run.finished, measure, *numbers, run.folder))
    return text.getvalue()

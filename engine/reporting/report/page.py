"""A report as one page of HTML that loads nothing, and as text that a repository shows."""

from __future__ import annotations

import base64
from collections.abc import Iterator, Sequence
from html import escape
from typing import Any

from engine.reporting.report.comparing import Group
from engine.reporting.report.figures import figures_of
from engine.reporting.report.tables import Table, as_markdown, shown_gain, tables_of

_STYLE = """\
:root { color-scheme: light; --ink: #111827; --soft: #6b7280; --line: #e5e7eb; --paper: #ffffff; --wash: #f9fafb; }
* { box-sizing: border-box; }
body { margin: 0; background: var(--wash); color: var(--ink); font: 16px/1.5 system-ui, sans-serif; }
main { max-width: 1080px; margin: 0 auto; padding: 24px 16px 64px; }
h1 { font-size: 1.7rem; line-height: 1.2; margin: 0 0 8px; overflow-wrap: anywhere; }
h2 { font-size: 1.25rem; margin: 40px 0 4px; overflow-wrap: anywhere; }
h3 { font-size: 1rem; margin: 24px 0 2px; }
p { margin: 4px 0 10px; } .note, figcaption, footer { color: var(--soft); font-size: .875rem; }
.lead { font-size: 1.05rem; }
.scroll { overflow-x: auto; background: var(--paper); border: 1px solid var(--line); border-radius: 8px; }
table { border-collapse: collapse; width: 100%; font-variant-numeric: tabular-nums; font-size: .875rem; }
th, td { padding: 7px 12px; text-align: left; vertical-align: top; border-bottom: 1px solid var(--line); }
td { white-space: nowrap; } th { color: var(--soft); font-weight: 600; min-width: 5.5em; }
tr:last-child td { border-bottom: 0; }
th:first-child, td:first-child { position: sticky; left: 0; background: var(--paper); font-weight: 600; }
td.long { white-space: normal; min-width: 16em; overflow-wrap: anywhere; }
.figures { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 400px), 1fr)); gap: 12px; }
.figures { margin: 16px 0; }
figure { margin: 0; padding: 12px; background: var(--paper); border: 1px solid var(--line); border-radius: 8px; }
figure img { width: 100%; height: auto; display: block; } figure b { display: block; font-size: .9rem; }
li { overflow-wrap: anywhere; } code { font-size: .85em; }
summary { cursor: pointer; padding: 4px 0; color: var(--soft); font-size: .875rem; }
"""

_LONG = 24
"""Rows of a table above which one has to ask for them."""


def as_html(title: str, about: str, groups: Sequence[Group]) -> str:
    """The page. Its pictures stand in it."""
    parts = [
        "<!doctype html>",
        '<html lang="en"><head><meta charset="utf-8">',
        '<meta name="viewport" content="width=device-width, initial-scale=1">',
        f"<title>{escape(title)}</title>",
        f"<style>\n{_STYLE}</style></head><body><main>",
        f"<h1>{escape(title)}</h1>",
        f'<p class="lead">{escape(about)}</p>' if about else "",
    ]
    for group in groups:
        parts.append(f"<h2>{escape(group.title)}</h2>")
        parts.append(f"<p>{escape(in_words(group))}</p>")
        accuracy, *others = tables_of(group)
        parts += [_html_table(accuracy), *_sources(group, html=True), '<div class="figures">']
        for name, words, svg in figures_of(group):
            data = base64.b64encode(svg.encode()).decode()
            parts.append(
                f'<figure><b>{escape(name)}</b><img alt="{escape(words)}" src="data:image/svg+xml;base64,{data}">'
                f"<figcaption>{escape(words)}</figcaption></figure>"
            )
        parts.append("</div>")
        parts += [_html_table(table) for table in (*others, recipe_table(group), runs_table(group))]
    parts.append("</main></body></html>")
    return "\n".join(part for part in parts if part) + "\n"


def as_text(title: str, about: str, groups: Sequence[Group]) -> str:
    """The same without pictures, in Markdown."""
    parts = [f"# {title}", about]
    for group in groups:
        parts += [f"## {group.title}", in_words(group)]
        accuracy, *others = tables_of(group)
        sources = "\n".join(_sources(group, html=False))
        parts += [as_markdown(accuracy), sources]
        parts += [as_markdown(table) for table in (*others, recipe_table(group), runs_table(group))]
    return "\n\n".join(part for part in parts if part) + "\n"


def in_words(group: Group) -> str:
    """What the numbers of a group say, in a sentence or two."""
    if group.baseline is None:
        return "No row of networks that train alone: gains cannot be given."
    said: dict[str, list[str]] = {
        "a gain": [],
        "a loss": [],
        "not to be told from none": [],
        "one seed says little": [],
    }
    for row in group.rows:
        gain = group.gain(row, "deployed", "last")
        if gain is None:
            continue
        if gain.half_width is None:
            verdict = "one seed says little"
        elif not gain.is_clear:
            verdict = "not to be told from none"
        else:
            verdict = "a gain" if gain.mean > 0 else "a loss"
        said[verdict].append(f"{row.method} {shown_gain(gain)}")
    parts = [f"{verdict}: {', '.join(rows)}" for verdict, rows in said.items() if rows]
    return f"Against the same networks trained alone, in points of top-1; {'; '.join(parts)}." if parts else ""


def recipe_table(group: Group) -> Table:
    """What the rows have in common, and what is meant to differ."""
    config = group.rows[0].runs[0].config
    schedule, optimizer = config.schedule, config.optimizer
    length = f"{config.train.max_steps} steps" if config.train.max_steps else f"{config.train.epochs} epochs"
    falls = f", times {schedule.gamma:g} at {', '.join(f'{m:g}' for m in schedule.milestones)}"
    rows = [
        ("data", f"{config.data.dataset}, batches of {config.data.global_batch}"),
        ("length", f"{length}, {schedule.name} schedule{falls if schedule.milestones else ''}"),
        (
            "optimiser",
            f"{optimizer.name}, rate {optimizer.lr:g}, decay {optimizer.weight_decay:g}",
        ),
        ("augmentation", _set_keys(config.data.augmentation) or "none beyond the defaults"),
    ]
    rows += [
        (f"{key} differs", "; ".join(f"{method}: {value}" for method, value in values.items()))
        for key, values in group.differs.items()
    ]
    note = "Compared with each other key by key; the configs are in the runs' folders."
    return Table("Recipe", note, ("of all rows", "is"), [(key, value) for key, value in rows])


def _set_keys(section: Any) -> str:
    found = section.model_dump(mode="json", exclude_defaults=True)
    return ", ".join(f"{key} {value}" for key, value in found.items())


def runs_table(group: Group) -> Table:
    """Where everything is from."""
    rows = []
    for row in group.rows:
        for run in row.runs:
            start = run.starts[-1] if run.starts else {}
            versions = start.get("versions", {}) if isinstance(start.get("versions"), dict) else {}
            rows.append(
                (
                    row.method,
                    str(run.config.seed),
                    "yes" if run.finished else f"epoch {run.scores[-1]['epoch']:g}",
                    str(start.get("git") or "?")[:10] + "*" * bool(start.get("git_changes")),
                    str(run.folder),
                    f"torch {versions.get('torch', '?')}",
                    str(start.get("platform", "?")),
                )
            )
    note = (
        "The revision of the program, with a star where it was changed. Runs that are not finished do not count above."
    )
    return Table("Runs", note, ("method", "seed", "finished", "revision", "folder", "versions", "machine"), rows)


def _sources(group: Group, *, html: bool) -> Iterator[str]:
    figures = {figure.source: figure.what for row in group.rows for figure in row.published()}
    if not figures:
        return
    words = "Published figures, each under its own recipe"
    lines = [f"{source}: {what}" for source, what in figures.items()]
    if html:
        yield f'<p class="note">{words}:</p><ul class="note">'
        yield from (f"<li>{escape(line)}</li>" for line in lines)
        yield "</ul>"
    else:
        yield f"{words}:\n"
        yield from (f"- {line}" for line in lines)


def _html_table(table: Table) -> str:
    head = "".join(f"<th>{escape(cell)}</th>" for cell in table.header)
    body = []
    for i, row in enumerate(table.rows):
        cells = []
        for j, cell in enumerate(row):
            text = f"<b>{escape(cell)}</b>" if (i, j) in table.strong else escape(cell)
            cells.append(f'<td class="long">{text}</td>' if len(cell) > 48 else f"<td>{text}</td>")
        body.append(f"<tr>{''.join(cells)}</tr>")
    whole = f'<div class="scroll"><table><thead><tr>{head}</tr></thead><tbody>{"".join(body)}</tbody></table></div>'
    if len(body) > _LONG:
        whole = f"<details><summary>{len(body)} rows</summary>{whole}</details>"
    return f'<h3>{escape(table.title)}</h3><p class="note">{escape(table.note)}</p>{whole}'

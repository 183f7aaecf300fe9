"""The rows that were found, as a Markdown table for each part."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from engine.files import write_text
from launch.bench.gpu.bench import ROWS, shortly

WHOLE = "whole part"
"""The row that says how long a part took."""

_ABOUT = ("part", "run", "card", "at")


def write_table(out: Path, titles: Mapping[str, str]) -> None:
    """Writes `gpu.md` from `rows.jsonl`: of each part what it found the last time that it ran.

    Args:
        titles: of each part, in order.
    """
    rows = [json.loads(line) for line in (out / ROWS).read_text(encoding="utf-8").splitlines()]
    lines = ["# What `python launch/bench gpu` found", ""]
    for part, title in titles.items():
        mine = [row for row in rows if row["part"] == part]
        if not mine:
            continue
        last = [row for row in mine if row["run"] == mine[-1]["run"]]
        # The last row, of the command itself, knows no card.
        about = [next((row["card"] for row in last if row["card"]), "no card"), last[0]["run"]]
        about += [f"{row['seconds']} s in all" for row in last if row["what"] == WHOLE]
        lines += [f"## {part}: {title}", "", "; ".join(about), "", *_table(last), ""]
    write_text(out / "gpu.md", "\n".join(lines))


def _table(found: list[dict[str, Any]]) -> list[str]:
    rows = [row for row in found if row["what"] != WHOLE]
    columns = list(dict.fromkeys(key for row in rows for key in row if key not in _ABOUT))
    cells = [[shortly(row[key]).replace("|", "/") if key in row else "" for key in columns] for row in rows]
    return [
        f"| {' | '.join(columns)} |",
        f"|{' --- |' * len(columns)}",
        *(f"| {' | '.join(line)} |" for line in cells),
    ]

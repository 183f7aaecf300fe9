"""What a run leaves behind, said once at its end: how long it took, what lies where, and what to do next."""

from __future__ import annotations

import statistics
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from engine.reporting.bar import clock
from engine.reporting.tracking import read_metrics, read_starts
from engine.safety import checkpoint

PARTS = ("data", "forward", "exchange", "backward", "optimizer")


def closing(run: Path, seconds: float) -> Iterator[str]:
    """Lines in the manner of `opening.summary`.

    Args:
        run: its folder, with metrics.
        seconds: that this start took.
    """
    lines = read_metrics(run)
    starts = len(read_starts(run / "starts.json"))
    since = f", the last of {starts} starts" if starts > 1 else ""
    yield f"took   {clock(seconds)}{since}; {_pace(lines)}"
    steps = checkpoint.steps_on_disk(run)
    kept = f"checkpoint{'s' * (len(steps) > 1)} of step {', '.join(f'{step:,}' for step in steps)}"
    yield f"kept   {run}: config.yaml, metrics.jsonl, table.txt, curves.png, {kept}"
    yield f"next   python launch/evaluate.py {run} --confusion confusion.csv; python launch/export.py {run}"


def _pace(lines: Sequence[Mapping[str, Any]]) -> str:
    """Images a second, and the part of a step that each of its parts takes: medians over the lines of the whole run."""
    told = [line for line in lines if "speed/images_per_second" in line]
    if not told:
        return "no step was trained"
    images = statistics.median(line["speed/images_per_second"] for line in told)
    spent = {part: statistics.median(line.get(f"speed/{part}_ms", 0.0) for line in told) for part in PARTS}
    whole = sum(spent.values())
    shares = ", ".join(f"{part} {100 * spent[part] / whole:.0f} %" for part in PARTS) if whole else "nothing timed"
    memory = max(line.get("speed/peak_mib", 0.0) for line in told)
    return f"{images:,.0f} images/s, of a step {shares}; at most {memory:,.0f} MiB on rank 0"

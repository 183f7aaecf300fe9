"""What a part is given: where it runs, how long it may, and where its rows go."""

from __future__ import annotations

import json
import os
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from engine.ranks.collectives import Launch
from launch.bench.turns import Quartiles

ROWS = "rows.jsonl"


@dataclass(frozen=True)
class Bench:
    """One rank of a part."""

    part: str
    out: Path
    run: str
    """When the command was started."""
    quick: bool
    launch: Launch
    device: torch.device
    deadline: float
    """`time.monotonic()` at which the part is killed."""

    def until(self, share: float = 1.0, spare: float = 3.0) -> float:
        """When to stop measuring, so that a part of the time that is left now is used, and some is spared."""
        now = time.monotonic()
        return now + share * max(self.deadline - spare - now, 0.0)

    def left(self) -> float:
        """Seconds until the part is killed."""
        return self.deadline - time.monotonic()

    def row(self, what: str, **found: Any) -> None:
        """Appends a row to what has been found, at once and to the disk. Rank 0 alone has a say."""
        if self.launch.rank == 0:
            append(self.out, self.part, self.run, self.card, what, **found)

    @property
    def card(self) -> str:
        """The device's name and torch's version."""
        if self.device.type != "cuda":
            return f"CPU, {torch.get_num_threads()} threads, torch {torch.__version__}"
        return f"{torch.cuda.get_device_name(self.device)}, torch {torch.__version__}"


def append(out: Path, part: str, run: str, card: str, what: str, **found: Any) -> None:
    """Writes a row that stays whatever happens next."""
    row = {"part": part, "run": run, "card": card, "at": round(time.time(), 1), "what": what, **found}
    with open(out / ROWS, "a", encoding="utf-8") as file:
        file.write(json.dumps(row) + "\n")
        file.flush()
        os.fsync(file.fileno())
    shown = ", ".join(f"{key} {shortly(value)}" for key, value in found.items())
    print(f"{part:18} {what}: {shown}", flush=True)


def shortly(value: Any) -> str:
    """A number of four digits that count; anything else as it is."""
    if isinstance(value, float):
        return f"{value:.4g}" if abs(value) < 1000 else f"{value:,.0f}"
    return f"{value:,}" if isinstance(value, int) else str(value)


def spread(name: str, found: Quartiles) -> dict[str, Any]:
    """Columns of a median and its quartiles."""
    return {name: found.middle, f"{name}: quartiles": f"{found.low:.3f} to {found.high:.3f}"}

"""How far the runs of a sweep are, by what lies in their folders: whoever trains them, here or on a cluster."""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from engine.config import RunConfig
from engine.config.grid import Cell, Grid
from engine.config.loading import dump_anywhere
from engine.files import open_to_read, write_json, write_text
from engine.ranks.owner import user_of
from engine.safety import checkpoint
from engine.training.due import due

State = Literal["waiting", "running", "interrupted", "failed", "complete"]

_TAIL = 1 << 17
"""Bytes at the end of a file of metrics in which its last evaluation is looked for."""


@dataclass(frozen=True)
class Standing:
    """Of one run."""

    state: State
    epoch: float
    share: float
    """Of the run that is done, from 0 to 1."""
    top1: float | None
    """Mean of the peers at the last evaluation, in percent."""
    said: str
    """Why it failed, or who trains it."""


def standing(folder: Path, cell: Cell) -> Standing:
    """Where a run of the sweep in `folder` stands."""
    run = cell.config.folder
    train = cell.config.train
    step, epoch, top1 = _last(run, [name for name, _ in cell.config.trained])
    share = min(1.0, step / train.max_steps if train.max_steps else epoch / (train.epochs or 1))
    user = user_of(run)
    if user:
        return Standing("running", epoch, share, top1, user)
    if is_complete(cell.config):
        return Standing("complete", epoch, share, top1, "")
    if failure := read_failure(folder, cell):
        return Standing("failed", epoch, share, top1, failure)
    begun: State = "interrupted" if checkpoint.steps_on_disk(run) else "waiting"
    return Standing(begun, epoch, share, top1, "")


def is_complete(config: RunConfig) -> bool:
    """Whether the newest checkpoint of a run is that of its last step."""
    for step in reversed(checkpoint.steps_on_disk(config.folder)):
        with contextlib.suppress(checkpoint.CheckpointError):
            manifest = checkpoint.read_manifest(checkpoint.folder_of(config.folder, step))
            return bool(manifest.steps_per_epoch) and due(config, manifest.step, manifest.steps_per_epoch).ends_run
    return False


def _last(run: Path, peers: Sequence[str]) -> tuple[int, float, float | None]:
    """Steps and epochs done, and the mean top-1 at the last evaluation."""
    step, epoch, top1 = 0, 0.0, None
    for line in _tail(run / "metrics.jsonl"):
        step, epoch = line.get("step", step), line.get("epoch", epoch)
        found = [line.get(f"val/{name}/top1") for name in peers]
        top1s = [value for value in found if value is not None]
        if len(top1s) == len(peers):
            top1 = sum(top1s) / len(top1s)
    return step, epoch, top1


def _tail(path: Path) -> Iterator[dict[str, Any]]:
    try:
        with open_to_read(path) as file:
            file.seek(max(0, os.fstat(file.fileno()).st_size - _TAIL))
            lines = file.read().split(b"\n")
    except OSError:
        return
    for text in lines:
        with contextlib.suppress(ValueError):
            if isinstance(line := json.loads(text), dict):
                yield line


def log_of(folder: Path, cell: Cell) -> Path:
    """What a run's processes print, of all its starts."""
    return folder / "logs" / f"{cell.name}.log"


def config_of(folder: Path, cell: Cell) -> Path:
    """The config that a run is started with."""
    return folder / "cells" / f"{cell.name}.yaml"


def _failure_of(folder: Path, cell: Cell) -> Path:
    return folder / "failed" / f"{cell.name}.txt"


def read_failure(folder: Path, cell: Cell) -> str:
    """The last line of the error with which a run has ended; empty where it has not."""
    with contextlib.suppress(OSError):
        return _failure_of(folder, cell).read_text(encoding="utf-8").strip()
    return ""


def set_failure(folder: Path, cell: Cell, said: str) -> None:
    """Remembers, or with an empty line forgets, that a run has failed."""
    path = _failure_of(folder, cell)
    if said:
        path.parent.mkdir(exist_ok=True)
        write_text(path, said + "\n")
    else:
        path.unlink(missing_ok=True)


def last_line_of_error(log: Path, begin: int) -> str:
    """What a process has said last of why it failed: its last line that names an error, else its last.

    Args:
        begin: bytes of the log that are of earlier starts.
    """
    with open_to_read(log) as file:
        file.seek(begin)
        text = file.read().decode(errors="replace")
    lines = [line.strip() for line in text.replace("\r", "\n").splitlines() if line.strip()]
    named = [
        line for line in lines if line.startswith("error: ") or line.split(":")[0].endswith(("Error", "Exception"))
    ]
    return (named or lines or ["it has said nothing"])[-1]


def write_down(grid: Grid, cells: Sequence[Cell]) -> None:
    """Keeps what the sweep is, for reports, and the config of each run, for those who start them."""
    folder = grid.folder
    for name in ("cells", "logs"):
        (folder / name).mkdir(parents=True, exist_ok=True)
    for cell in cells:
        # Whoever starts it may stand elsewhere.
        config = cell.config.model_copy(update={"dir": cell.config.folder.absolute()})
        write_text(config_of(folder, cell), dump_anywhere(config))
    written = {
        cell.name: {
            "method": cell.method,
            "network": cell.network,
            "override": cell.override,
            "seed": cell.seed,
            "meant": list(cell.meant),
        }
        for cell in cells
    }
    before = read_sweep(folder).cells
    # Seeds of an earlier start of the same sweep stay in its report.
    write_json(folder / "sweep.json", {"name": grid.name, "about": grid.about, "cells": {**before, **written}})


@dataclass(frozen=True)
class Sweep:
    """What the sweep in a folder is, as `write_down` has left it."""

    name: str = ""
    about: str = ""
    cells: dict[str, Any] = field(default_factory=dict)
    """Of each run: method, network, override, seed and the keys in which it differs on purpose."""


def read_sweep(folder: Path) -> Sweep:
    """The sweep in a folder; one without a name and runs where there is none."""
    with contextlib.suppress(OSError, ValueError, TypeError):
        return Sweep(**json.loads((folder / "sweep.json").read_text(encoding="utf-8")))
    return Sweep()

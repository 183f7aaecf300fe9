"""Files of the data set that cannot be read: what all ranks have met, in a file of the run's folder."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch.distributed as dist

from data_pipelines import Pipeline
from data_pipelines.damage import Damaged
from engine.files import read_text, write_json
from engine.ranks.placement import Placement

NAME = "damaged.json"


def tell_damage(pipeline: Pipeline, placement: Placement, folder: Path, say: Callable[[str], None]) -> None:
    """Brings together what the ranks have met since the last time; the first one writes it down. Every rank calls it.

    Args:
        pipeline: whose samples they are.
        placement: of this rank.
        folder: of the run.
        say: prints a line on the first rank.

    Raises:
        DataError: on all ranks, where more than `data.max_bad` is damaged.
    """
    if pipeline.damage is None:
        return
    met: dict[Damaged, int] = {}
    for found in _gathered(pipeline.damage.take()):
        for damaged, times in found.items():
            met[damaged] = met.get(damaged, 0) + times
    if met and placement.rank == 0:
        say(_written(folder / NAME, met))
    pipeline.damage.check(met)


def _written(path: Path, met: dict[Damaged, int]) -> str:
    """Adds to the file what is new. Returns what there is to say."""
    known = {(entry["split"], entry["path"], entry["reason"]): entry["times"] for entry in _read(path)}
    before = len({key[:2] for key in known})
    for damaged, times in met.items():
        key = (damaged.split, damaged.path, damaged.reason)
        known[key] = known.get(key, 0) + times
    entries = [
        {"split": split, "path": where, "reason": reason, "times": times}
        for (split, where, reason), times in sorted(known.items())
    ]
    write_json(path, entries)
    files = len({key[:2] for key in known})
    return (
        f"{files} file{'s' * (files != 1)} of the data set cannot be read, {files - before} more than before: replaced "
        f"in training, counted as wrong in validation; {path} says which and why"
    )


def _read(path: Path) -> list[dict[str, Any]]:
    try:
        entries: list[dict[str, Any]] = json.loads(read_text(path))
    except (OSError, ValueError):
        return []
    return entries


def _gathered(mine: object) -> list:
    everyone: list = [None] * dist.get_world_size()
    dist.all_gather_object(everyone, mine)
    return everyone

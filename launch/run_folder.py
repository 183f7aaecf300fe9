"""What commands need of a finished or unfinished run, which may be in training at the moment."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, TypeVar

import torch.distributed as dist

from engine.config import ConfigError, RunConfig
from engine.config import loading as config_file
from engine.safety import checkpoint, loading
from engine.safety.checkpoint import CheckpointError, Manifest

_Used = TypeVar("_Used")

_TRIES = 5
"""Checkpoints that may be pruned, one after another, while they are read."""


def settings_of(run: Path, overrides: Sequence[str] = ()) -> RunConfig:
    """The config of a run. Raises: ConfigError, also where the folder holds none."""
    if not (run / "config.yaml").is_file():
        raise ConfigError(f"{run}: not a run's folder: it has no config.yaml; expected a folder that train.py wrote")
    return config_file.load_run(run, overrides)


def choose(run: Path, which: str) -> Manifest:
    """One of a run's checkpoints, verified: `newest`, `best` or the number of a step.

    Raises:
        CheckpointError: there is no such checkpoint, or it is damaged.
    """
    newest, damaged = loading.newest(run)
    if newest is None:
        raise CheckpointError("\n".join([*damaged, f"{run}: has no checkpoint that can be used"]))
    if which == "newest":
        return newest
    step = choose_step(run, which, newest.step, newest.best.step if newest.best else None)
    return loading.verify(checkpoint.folder_of(run, step))


def use(run: Path, which: str, action: Callable[[Manifest], _Used]) -> _Used:
    """Does something with a checkpoint that `choose` finds; with the next one where training prunes it meanwhile.

    Raises:
        CheckpointError: as `choose` and the action.
    """
    for _ in range(_TRIES - 1):
        manifest = choose(run, which)
        try:
            return action(manifest)
        except CheckpointError:
            if checkpoint.folder_of(run, manifest.step).exists():
                raise
    return action(choose(run, which))


def use_together(run: Path, which: str, action: Callable[[Manifest], None]) -> Manifest:
    """As `use`, on all ranks of a world: rank 0 chooses for all. All ranks call this.

    Args:
        action: fails on all ranks or on none.

    Returns:
        What was used.
    """
    first = dist.get_rank() == 0
    for attempt in range(_TRIES):
        told: list[Any] = [None, None]
        if first:
            try:
                told[0] = choose(run, which)
            except (CheckpointError, OSError) as error:
                told[1] = str(error)
        dist.broadcast_object_list(told, src=0)
        if told[1]:
            raise CheckpointError(told[1])
        try:
            action(told[0])
            break
        except CheckpointError:
            there = [first and checkpoint.folder_of(run, told[0].step).exists()]
            dist.broadcast_object_list(there, src=0)
            if there[0] or attempt == _TRIES - 1:
                raise
    return told[0]


def choose_step(run: Path, which: str, newest: int | None, best: int | None) -> int:
    """The step that `--checkpoint` means: `newest`, `best` or a number.

    Raises:
        CheckpointError: it is not on disk.
    """
    step = {"newest": newest, "best": best}.get(which, int(which) if which.isdecimal() else None)
    steps = checkpoint.steps_on_disk(run)
    if step is None or step not in steps:
        listed = ", ".join(str(s) for s in steps) or "none"
        raise CheckpointError(f"--checkpoint {which}: expected newest, best or a step; {run} has the steps {listed}")
    return step

"""What evaluate and export need of a finished or unfinished run."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from engine import checkpoint, config_file
from engine.checkpoint import CheckpointError, Manifest
from engine.config import ConfigError, RunConfig


def open_run(run: Path, which: str, overrides: Sequence[str] = ()) -> tuple[RunConfig, Manifest]:
    """The config of a run and one of its checkpoints, verified: `newest`, `best` or the number of a step.

    Raises:
        ConfigError: the folder holds no run.
        CheckpointError: there is no such checkpoint, or it is damaged.
    """
    if not (run / "config.yaml").is_file():
        raise ConfigError(f"{run}: not a run's folder: it has no config.yaml; expected a folder that train.py wrote")
    settings = config_file.load(run / "config.yaml", overrides)
    newest, damaged = checkpoint.newest(run)
    if newest is None:
        raise CheckpointError("\n".join([*damaged, f"{run}: has no checkpoint that can be used"]))
    if which == "newest":
        return settings, newest
    steps = checkpoint.steps_on_disk(run)
    step = newest.best.step if which == "best" and newest.best else int(which) if which.isdigit() else None
    if step not in steps:
        listed = ", ".join(str(s) for s in steps)
        raise CheckpointError(f"--checkpoint {which}: expected newest, best or a step; {run} has the steps {listed}")
    return settings, checkpoint.verify(checkpoint.folder_of(run, step))

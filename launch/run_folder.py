"""What commands need of a finished or unfinished run."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from engine.config import ConfigError, RunConfig
from engine.config import loading as config_file
from engine.safety import checkpoint, loading
from engine.safety.checkpoint import CheckpointError, Manifest


def open_run(run: Path, which: str, overrides: Sequence[str] = ()) -> tuple[RunConfig, Manifest]:
    """The config of a run and one of its checkpoints, verified: `newest`, `best` or the number of a step.

    Raises:
        ConfigError: the folder holds no run.
        CheckpointError: there is no such checkpoint, or it is damaged.
    """
    if not (run / "config.yaml").is_file():
        raise ConfigError(f"{run}: not a run's folder: it has no config.yaml; expected a folder that train.py wrote")
    settings = config_file.load_run(run, overrides)
    newest, damaged = loading.newest(run)
    if newest is None:
        raise CheckpointError("\n".join([*damaged, f"{run}: has no checkpoint that can be used"]))
    if which == "newest":
        return settings, newest
    step = choose_step(run, which, newest.step, newest.best.step if newest.best else None)
    return settings, loading.verify(checkpoint.folder_of(run, step))


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

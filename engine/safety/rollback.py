"""Going back: the run starts anew from a checkpoint that is from before numbers went wrong, as after a kill, and the
steps that went wrong are left out. Their numbers are used up, so order, augmentation and schedule stay what they were.

`rollbacks.json` in the run's folder says which steps; it is there before anything else is changed. What follows from it
(which checkpoints no longer count) is done at each start, so that a kill in between changes nothing.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from engine.files import read_text, write_json
from engine.safety import checkpoint, loading
from engine.safety.checkpoint import CheckpointError, Manifest


class GoBack(Exception):  # noqa: N818 (nothing has failed)
    """The run is to be built anew, on all ranks; raised after the rollback has been written down."""


@dataclass(frozen=True)
class Rollback:
    """One return to an earlier checkpoint."""

    begin: int
    """Updates begin .. end - 1, counted from 0, are not made."""
    end: int
    """The step at which it was decided."""
    reason: str


def read(run: Path) -> list[Rollback]:
    """The rollbacks of a run, in the order in which they were decided.

    Raises:
        CheckpointError: the file is not what this module writes.
    """
    path = run / "rollbacks.json"
    try:
        entries = json.loads(read_text(path))
        if not isinstance(entries, list):
            raise TypeError(f"found {type(entries).__name__}")
        return [Rollback(**entry) for entry in entries]
    except FileNotFoundError:
        return []
    except (OSError, UnicodeDecodeError, json.JSONDecodeError, TypeError) as error:
        raise CheckpointError(
            f"{path}: not a list of rollbacks: {error}; without it the run cannot go on as it was"
        ) from None


def write(run: Path, rollbacks: Sequence[Rollback]) -> None:
    """Has the disk keep them."""
    write_json(run / "rollbacks.json", [asdict(rollback) for rollback in rollbacks])


def supersede(run: Path, rollbacks: Sequence[Rollback]) -> None:
    """Removes the checkpoints that hold updates which a later rollback leaves out. Damaged ones stay as they are."""
    for step in checkpoint.steps_on_disk(run):
        folder = checkpoint.folder_of(run, step)
        try:
            known = checkpoint.read_manifest(folder).rollbacks
        except CheckpointError:
            continue
        if any(step > rollback.begin for rollback in rollbacks[known:]):
            checkpoint.remove(folder)


def left_out(rollbacks: Sequence[Rollback], update: int) -> bool:
    """Whether an update, counted from 0, is not made."""
    return any(rollback.begin <= update < rollback.end for rollback in rollbacks)


def before(rollbacks: Sequence[Rollback], update: int, count: int = 1) -> int:
    """The update that was made `count` made updates before this one; 0 where there are fewer."""
    while count and update > 0:
        update -= 1
        count -= not left_out(rollbacks, update)
    return update


def where_to_go_on(run: Path) -> tuple[Manifest | None, list[str], list[Rollback]]:
    """The newest checkpoint that counts, what is wrong with newer ones, and the rollbacks. On rank 0: it removes what a
    rollback has made void.

    Raises:
        CheckpointError: there are checkpoints, and none can be used.
    """
    rollbacks = read(run)
    supersede(run, rollbacks)
    manifest, damaged = loading.newest(run)
    if manifest is None and damaged:
        reasons = "".join(f"\n  {reason}" for reason in damaged)
        raise CheckpointError(
            f"{run}: none of its checkpoints can be used, and a run that has some is not begun anew by itself: bring "
            f"them back (is the file server there?) or start over with --fresh, which moves that folder aside{reasons}"
        )
    if manifest and manifest.best and manifest.best.step not in checkpoint.steps_on_disk(run):
        # It had made room for a better one, from which the run has gone back.
        manifest = replace(manifest, best=None)
    return manifest, damaged, rollbacks

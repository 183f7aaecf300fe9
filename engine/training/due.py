"""What is due after a step, by the config alone."""

from __future__ import annotations

from dataclasses import dataclass

from engine.config import RunConfig


@dataclass(frozen=True)
class Due:
    """After one step."""

    line: bool
    """A line of metrics; before all else that is due."""
    score: bool
    """An evaluation."""
    save: bool
    """A checkpoint."""
    ends_epoch: bool
    ends_run: bool


def due(config: RunConfig, step: int, steps_per_epoch: int, *, stopping: bool = False) -> Due:
    """What is due once `step` steps are done.

    Args:
        stopping: the run is asked to end here.
    """
    epoch, within = divmod(step, steps_per_epoch)
    ends_epoch, ends_run = within == 0, step == config.train.steps(steps_per_epoch)
    every_steps = config.checkpoint.every_steps
    save = ends_run or stopping or (ends_epoch and epoch % config.checkpoint.every_epochs == 0)
    save |= every_steps is not None and step % every_steps == 0
    looks = config.evaluation
    score = ends_run or bool(ends_epoch and looks.every_epochs and epoch % looks.every_epochs == 0)
    score |= looks.every_steps is not None and step % looks.every_steps == 0
    line = save or score or ends_epoch or within % config.log.every_steps == 0
    return Due(line, score, save, ends_epoch, ends_run)

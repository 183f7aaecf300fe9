"""Where a run goes on: rank 0 chooses for all, and a run whose data are not what they were does not go on unasked."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch.distributed as dist

from data_pipelines import Pipeline
from engine.config import ConfigError, RunConfig
from engine.safety import rollback
from engine.safety.checkpoint import CheckpointError, Manifest
from engine.safety.rollback import Rollback
from losses import METHODS
from losses.capabilities import Tables


@dataclass(frozen=True)
class Standpoint:
    """Where a start of a run goes on."""

    manifest: Manifest | None
    """Of the checkpoint; None where there is none yet."""
    rollbacks: list[Rollback]
    said: list[str]
    """What a person should be told of it."""


def find(config: RunConfig, pipeline: Pipeline, rank: int) -> Standpoint:
    """Chooses the checkpoint that all ranks go on from. All ranks call this, before networks are built: the pipeline's
    epochs have the steps that those of the run have afterwards.

    Raises:
        CheckpointError: on all ranks: there are checkpoints, and none can be used.
        ConfigError: on all ranks: the data are not those that the run was started with.
    """
    found: list[Any] = [None, None]
    if rank == 0:
        try:
            found[0] = rollback.where_to_go_on(config.folder)
        except (CheckpointError, OSError) as error:
            found[1] = str(error)
    dist.broadcast_object_list(found, src=0)
    if found[1]:
        raise CheckpointError(found[1])
    manifest, damaged, rollbacks = found[0]
    said = [f"not used: {message}" for message in damaged]
    if manifest is not None:
        said += _check_same_data(config, manifest, pipeline)
        pipeline.steps_per_epoch = manifest.steps_per_epoch or pipeline.steps_per_epoch
    return Standpoint(manifest, rollbacks, said)


def _check_same_data(config: RunConfig, manifest: Manifest, pipeline: Pipeline) -> list[str]:
    """Returns: what has changed and may. Raises: ConfigError, where it may not."""
    folder, steps = config.folder, manifest.steps_per_epoch
    changed = {
        name: (before, pipeline.contents.get(name))
        for name, before in manifest.data.items()
        if before != pipeline.contents.get(name)
    }
    if not changed:
        return []
    name, (before, now) = next(iter(changed.items()))
    what = f"data: {name}: {now}; the run in {folder} was started with {before}"
    restore = "bring the data back as they were, or give this one another name= or dir="
    hindrance = _hindrance(config, changed, steps, pipeline.steps_per_epoch)
    if hindrance:
        raise ConfigError(f"{what}: {restore}; {hindrance}")
    if not config.checkpoint.data_may_change:
        raise ConfigError(
            f"{what}: {restore}; or, if files were added or lost and that is meant, "
            f"checkpoint.data_may_change=true goes on: an epoch keeps its {steps} steps, and shows images of those "
            "that are there now, some of them twice if they are too few"
        )
    return [f"going on with other data: {name}: {before} -> {now}" for name, (before, now) in changed.items()]


def _hindrance(config: RunConfig, changed: dict[str, Any], before: int, now: int) -> str | None:
    """Why a run cannot go on with other data even if its user wants it to."""
    if "classes" in changed:
        return "labels mean other classes now, so it cannot go on"
    if issubclass(METHODS[config.method.name], Tables):
        return f"{config.method.name} remembers each training image by its number, so it cannot go on"
    if before > now and config.data.sampler == "class_tuples":
        return (
            f"an epoch of this run has {before} steps; what is left makes {now}, and class_tuples shows no image twice"
        )
    if config.data.held_out:
        return "images that were held out would be trained on (data.held_out), so it cannot go on"
    return None

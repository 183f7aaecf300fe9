"""What has the peers of a rank computed one after another."""

from __future__ import annotations

from engine.config import RunConfig
from losses import METHODS
from losses.capabilities import trunk_of, turns_of


def reason(config: RunConfig) -> str | None:
    """Why neither threads nor a pass over all can take the place of one peer after another, by all that a config says;
    None where they can."""
    method = METHODS[config.method.name]
    if trunk_of(method, config.method, 3) is not None:
        return f"the peers of {method.name} are branches of one network"
    if len(turns_of(method, config.method, len(config.cohort))) > 1:
        return "the peers are updated one after another"
    if config.precision.compile:
        return "precision.compile compiles the peers one by one"
    if config.train.drop_path:
        return "train.drop_path has each peer draw the paths that it drops"
    return None

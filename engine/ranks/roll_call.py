"""Ranks that are to train together say what they run with; where they differ, the run ends before it begins.

One exchange of a few hundred bytes a rank at the start, and nothing in a step.
"""

from __future__ import annotations

import functools
import hashlib
import json
import os
import platform
import socket
from collections import Counter
from collections.abc import Mapping
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from engine.config import ConfigError, RunConfig
from engine.config.identity import differences

PACKAGES = ("torch", "torchvision", "timm", "numpy", "nvidia-dali-cuda120", "nvidia-dali-cuda130")
"""Whose versions numbers depend on."""

_ROOMS = ("data_pipelines", "engine", "losses", "models")

_OWN = {
    "dir": None,
    "device": None,
    "data": {"root", "val_root", "val_labels", "classes", "cache", "decoding"},
    "placement": {"meeting"},
    "log": {"progress", "wandb", "wandb_project", "wandb_timeout", "tensorboard"},
}
"""Keys in which the ranks of one run may differ; None stands for a whole section."""


def roll_call(config: RunConfig, device: torch.device, contents: Mapping[str, str], failure: str | None) -> None:
    """Compares all ranks of the world, each of which calls this.

    Args:
        contents: of the data set, see `data_pipelines.Pipeline.contents`.
        failure: why this rank cannot train.

    Raises:
        ConfigError: on all ranks alike: naming a rank, its machine, what differs and both values; or a rank that cannot
            train, and why.
    """
    settings = _settings(config)
    mine = {
        "config": _digest(json.dumps(settings, sort_keys=True)),
        "device": device.type,
        **program(contents),
    }
    if config.placement.kind == "balanced":  # Which ranks a peer gets depends on what is a node.
        mine["LOCAL_WORLD_SIZE"] = os.environ.get("LOCAL_WORLD_SIZE", "")
    everyone = _gather((socket.gethostname(), failure, mine))
    hosts = [host for host, _, _ in everyone]
    failed = {rank: why for rank, (_, why, _) in enumerate(everyone) if why}
    for rank, why in failed.items():
        others = f" (and {len(failed) - 1} more ranks)" if len(failed) > 1 else ""
        raise ConfigError(f"rank {rank} on {hosts[rank]}{others}: {why}" if len(everyone) > 1 else why)
    said = [values for _, _, values in everyone]
    for key in mine:
        found = _odd_one([values.get(key) for values in said])
        if found is None:
            continue
        odd, usual = found
        name, here, there = key, said[odd].get(key), said[usual].get(key)
        if key == "config":
            both = _gather(settings)
            name, (there, here) = next(iter(differences(both[usual], both[odd]).items()))
        raise ConfigError(
            f"{name}: rank {odd} on {hosts[odd]} has {here!r}, rank {usual} on {hosts[usual]} has {there!r}; expected "
            "the same on all ranks of a run"
        )


def program(contents: Mapping[str, str]) -> dict[str, str]:
    """What numbers depend on beside the config: data, versions and code."""
    return {**{f"data: {name}": value for name, value in contents.items()}, **versions(), "code": code()}


def versions() -> dict[str, str]:
    """Of Python and of the packages that numbers depend on, as far as they are there."""
    found = {"python": platform.python_version()}
    for name in PACKAGES:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return found


@functools.cache
def code() -> str:
    """A digest of the program's files, those that train."""
    sha, root = hashlib.sha256(), Path(__file__).parents[2]
    for path in sorted(path for room in _ROOMS for path in (root / room).rglob("*.py")):
        sha.update(f"{path.relative_to(root)}\0".encode())
        sha.update(path.read_bytes())
    return sha.hexdigest()[:16]


def _settings(config: RunConfig) -> dict[str, Any]:
    raw = config.model_dump(mode="json")
    for section, keys in _OWN.items():
        if keys is None:
            raw.pop(section)
        else:
            raw[section] = {key: value for key, value in raw[section].items() if key not in keys}
    return raw


def _odd_one(values: list[str | None]) -> tuple[int, int] | None:
    """The first rank whose value is not that of most, and the first of those that have it; None where all are alike."""
    (usual, _), *others = Counter(values).most_common()
    if not others:
        return None
    return next(rank for rank, value in enumerate(values) if value != usual), values.index(usual)


def _gather(mine: Any) -> list[Any]:
    everyone: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(everyone, mine)
    return everyone


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:16]

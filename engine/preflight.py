"""What is looked at before anything is started."""

from __future__ import annotations

import os
from typing import Any

import data_pipelines
import models
from data_pipelines import DataConfig
from engine import checkpoint
from engine.cohort import looks_at_stages
from engine.collectives import Launch, choose_device
from engine.config import ConfigError, RunConfig
from engine.config_file import load
from engine.optim import check_optimizer
from engine.placement import Placement, plan
from losses import METHODS
from models.stages import stages
from models.weightless import weightless

NUMBERS_DO_NOT_DEPEND_ON = {
    "name": None,
    "dir": None,
    "device": None,
    "placement": {"kind", "peers_per_rank"},
    "evaluation": None,
    "checkpoint": None,
    "log": None,
    "report": None,
    "data": {"root", "threads", "decoder"},
    "method": {"bank_sharded", "chunk"},
    "precision": {"compile", "channels_last", "tf32"},
    "train": {"epochs", "max_skipped"},
}
"""What may change between two starts of a run; null stands for a whole section."""


def check(config: RunConfig, launch: Launch, *, fresh: bool = False) -> Placement:
    """Everything that can be refused before a process group exists or a device is touched.

    Args:
        fresh: the run's folder is about to be moved aside, so it does not matter what lies there.

    Raises:
        ConfigError: naming the key, the value, what was expected and the nearest valid choice.
    """
    device = choose_device(config.device, launch)
    check_optimizer(config.optimizer)
    if config.train.sync_bn and device.type != "cuda":
        raise ConfigError("train.sync_bn = True: works on CUDA devices only, this rank runs on the CPU; expected false")
    if config.data.decoder == "mixed" and device.type != "cuda":
        raise ConfigError(
            "data.decoder = mixed: decodes on CUDA devices, this rank runs on the CPU; expected auto or cpu"
        )
    placement = plan(config, launch.world, launch.rank)
    check_data(config)
    _check_stages(config)
    _check_folder(config)
    if not fresh:
        _check_same_run(config)
    return placement


def _check_stages(config: RunConfig) -> None:
    """Methods that look at feature maps need networks that have as many as they want."""
    method, options = METHODS[config.method.name], config.method
    if not looks_at_stages(method, options):
        return
    for peer in {(p.network, repr(p.options)): p for p in config.peers}.values():
        with weightless(peer.network):
            network = models.create(peer.network, 2, config.data.channels, **peer.options)
        try:
            found = len(stages(network, config.data.channels, config.data.side))
            method.taps(options, found)
            trunk = method.trunk(options, found)
            if trunk is not None and trunk >= found:
                raise ValueError(f"the peers would share {trunk} stages of {found}, and have none of their own")
        except ValueError as error:
            raise ConfigError(
                f"method.name = {method.name}: cannot train {peer.network} on images of {config.data.side} pixels: "
                f"{error}"
            ) from None


def check_data(config: RunConfig) -> None:
    """Looks at what is on disk, before any device is touched. Raises: ConfigError."""
    try:
        data_pipelines.check(config.data)
    except (data_pipelines.DataError, ImportError) as error:
        word = str(error).partition(":")[0]
        raise ConfigError(f"data{'.' if word in DataConfig.model_fields else ': '}{error}") from None


def _check_folder(config: RunConfig) -> None:
    there = next(path for path in (config.folder, *config.folder.absolute().parents) if path.exists())
    if not there.is_dir() or not os.access(there, os.W_OK | os.X_OK):
        what = "is not a folder" if not there.is_dir() else "may not be written to"
        raise ConfigError(f"dir = {str(config.folder)!r}: {there} {what}; expected a place for the run's folder")


def _check_same_run(config: RunConfig) -> None:
    path = config.folder / "config.yaml"
    if not path.exists() or not checkpoint.steps_on_disk(config.folder):
        return
    for key, (before, now) in _differences(_identity(load(path)), _identity(config)).items():
        raise ConfigError(
            f"{key} = {now!r}: the run in {config.folder} was started with {before!r}; give this one another name= or "
            "dir=, or start over with --fresh, which moves that folder aside"
        )


def _identity(config: RunConfig) -> dict[str, Any]:
    raw = config.model_dump(mode="json")
    for section, keys in NUMBERS_DO_NOT_DEPEND_ON.items():
        if keys is None:
            raw.pop(section)
        else:
            raw[section] = {key: value for key, value in raw[section].items() if key not in keys}
    return raw


def _differences(before: Any, now: Any, key: str = "") -> dict[str, tuple[Any, Any]]:
    if isinstance(before, dict) and isinstance(now, dict):
        found: dict[str, tuple[Any, Any]] = {}
        for name in {**before, **now}:
            found |= _differences(before.get(name), now.get(name), f"{key}.{name}" if key else name)
        return found
    return {} if before == now else {key: (before, now)}

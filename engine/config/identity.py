"""Which run a config is of: what the numbers depend on, and what may change between two starts."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import yaml

from data_pipelines.config import with_moved_keys
from engine.config import ConfigError, RunConfig
from engine.config.loading import dump_anywhere, load_run, validate

NUMBERS_DO_NOT_DEPEND_ON = {
    "name": None,
    "dir": None,
    "device": None,
    "placement": {"kind", "peers_per_rank", "ranks", "order", "exchange", "meeting"},
    "evaluation": None,
    "checkpoint": None,
    "log": None,
    "health": None,
    "report": None,
    "data": {
        "root",
        "val_root",
        "val_labels",
        "classes",
        "links",
        "cache",
        "decoding",
        "shared_decode",
        "on_error",
        "max_bad",
    },
    "method": {"bank_sharded", "chunk"},
    "precision": {"compile", "channels_last", "tf32", "graphs"},
    "train": {"epochs", "max_steps", "peer_threads", "batch_peers", "max_skipped", "timeout"},
}
"""What may change between two starts of a run; null stands for a whole section."""

DOUBTFUL = ("optimizer.lr", "schedule.", "train.clip_norm", "train.clip_factor", "train.ema_decay", "train.ema_warmup")
"""What may change where `checkpoint.recipe_may_change` says that it is meant; all else may not."""

_LATER_KEYS: dict[str, dict[str, Any]] = {
    "train": {"loss": "cross_entropy", "bce_threshold": None, "bce_sum": False, "clip_factor": None},
    "schedule": {"warmup_prefix": False, "every": None},
}
"""Keys that earlier versions did not write, and what they did."""


def identity(config: RunConfig) -> dict[str, Any]:
    """The keys that make two configs the same run, as plain data."""
    raw = config.model_dump(mode="json")
    for section, keys in NUMBERS_DO_NOT_DEPEND_ON.items():
        if keys is None:
            raw.pop(section)
        else:
            raw[section] = {key: value for key, value in raw[section].items() if key not in keys}
    for peer in raw["peers"]:
        if isinstance(peer["pretrained"], str):
            # A run may be started from anywhere, and the file of its start may have been moved since.
            peer["pretrained"] = Path(peer["pretrained"]).name
    return raw


def completed(stored: dict[str, Any], config: RunConfig) -> dict[str, Any]:
    """The identity of a run by an earlier version of this program, as this one would write it: keys that stood
    elsewhere are moved, and those that were not there yet have their defaults.

    Args:
        stored: an identity.
        config: of any run of the same kind; only keys that numbers do not depend on are taken from it.
    """
    stored = {**stored, "data": with_moved_keys(stored["data"])} if isinstance(stored.get("data"), dict) else stored
    raw = config.model_dump(mode="json")
    merged = dict(stored)
    for section, keys in NUMBERS_DO_NOT_DEPEND_ON.items():
        if keys is None:
            merged[section] = raw[section]
        elif isinstance(stored.get(section), dict):
            merged[section] = {**stored[section], **{key: raw[section][key] for key in keys if key in raw[section]}}
    try:
        return identity(validate(merged))
    except ConfigError:  # A key that is gone by now: then that is the difference.
        return stored


def identity_of_cohort(config: RunConfig) -> dict[str, Any]:
    """The same for all jobs whose peers train together."""
    raw = identity(config)
    del raw["placement"]["peer"]
    return raw


def read_identity(text: str) -> dict[str, Any]:
    """What either of these was written as, in JSON, by this version or by one whose keys stood elsewhere.

    Raises:
        ValueError, KeyError, TypeError: it is something else.
    """
    raw = json.loads(text)
    raw |= {section: {**keys, **raw[section]} for section, keys in _LATER_KEYS.items()}
    return {**raw, "data": with_moved_keys(raw["data"])}


def differences(before: Any, now: Any, key: str = "") -> dict[str, tuple[Any, Any]]:
    """{key: (before, now)} of every value in which two identities differ; in lists of one length by their places."""
    if isinstance(before, list) and isinstance(now, list) and len(before) == len(now):
        before, now = (dict(enumerate(values)) for values in (before, now))
    if isinstance(before, dict) and isinstance(now, dict):
        found: dict[str, tuple[Any, Any]] = {}
        for name in {**before, **now}:
            found |= differences(before.get(name), now.get(name), f"{key}.{name}" if key else name)
        return found
    return {} if before == now else {key: (before, now)}


def is_doubtful(key: str, before: Any, now: Any) -> bool:
    """Whether another value of a key could be meant. An average that a checkpoint does not hold cannot go on."""
    return f"{key}.".startswith(DOUBTFUL) and not (key == "train.ema_decay" and None in (before, now))


def changes(config: RunConfig) -> list[str]:
    """What is different from the last start of the run in the folder, key by key; nothing where there was none."""
    if not (config.folder / "config.yaml").is_file():
        return []
    before, now = (yaml.safe_load(dump_anywhere(one)) for one in (load_run(config.folder), config))
    before.pop("dir")
    now.pop("dir")
    return [f"{key}: {old!r} -> {new!r}" for key, (old, new) in differences(before, now).items()]

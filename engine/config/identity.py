"""Which run a config is of: what the numbers depend on, and what may change between two starts."""

from __future__ import annotations

import json
from typing import Any

from data_pipelines.config import with_moved_keys
from engine.config import RunConfig

NUMBERS_DO_NOT_DEPEND_ON = {
    "name": None,
    "dir": None,
    "device": None,
    "placement": {"kind", "peers_per_rank", "meeting"},
    "evaluation": None,
    "checkpoint": None,
    "log": None,
    "health": None,
    "report": None,
    "data": {"root", "decoding"},
    "method": {"bank_sharded", "chunk"},
    "precision": {"compile", "channels_last", "tf32"},
    "train": {"epochs", "max_skipped", "timeout"},
}
"""What may change between two starts of a run; null stands for a whole section."""

_LATER_KEYS_OF_TRAIN = {"loss": "cross_entropy", "bce_threshold": None, "bce_sum": False}
"""Keys that earlier versions did not write, and what they did."""


def identity(config: RunConfig) -> dict[str, Any]:
    """The keys that make two configs the same run, as plain data."""
    raw = config.model_dump(mode="json")
    for section, keys in NUMBERS_DO_NOT_DEPEND_ON.items():
        if keys is None:
            raw.pop(section)
        else:
            raw[section] = {key: value for key, value in raw[section].items() if key not in keys}
    return raw


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
    raw["train"] = {**_LATER_KEYS_OF_TRAIN, **raw["train"]}
    return {**raw, "data": with_moved_keys(raw["data"])}


def differences(before: Any, now: Any, key: str = "") -> dict[str, tuple[Any, Any]]:
    """{key: (before, now)} of every value in which two identities differ."""
    if isinstance(before, dict) and isinstance(now, dict):
        found: dict[str, tuple[Any, Any]] = {}
        for name in {**before, **now}:
            found |= differences(before.get(name), now.get(name), f"{key}.{name}" if key else name)
        return found
    return {} if before == now else {key: (before, now)}

"""Figures that were published, from published.yaml beside this file, which says where each stands."""

from __future__ import annotations

import functools
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from engine.config import RunConfig


@dataclass(frozen=True)
class Figure:
    """Of one method with certain networks on certain data."""

    top1: tuple[float, ...]
    """In percent, of each network where they differ, in the order of the cohort."""
    deviation: float | None
    source: str
    what: str
    """Which epoch and which network it is of, and of how many runs."""

    def __str__(self) -> str:
        shown = " & ".join(f"{value:.2f}" for value in self.top1)
        return shown if self.deviation is None else f"{shown} ± {self.deviation:.2f}"


def published(config: RunConfig) -> list[Figure]:
    """What was published of the method of a run, with its networks, as many peers and its data set."""
    networks = [peer.network for _, peer in config.trained if peer.learns]
    kinds = list(dict.fromkeys(networks))
    options = config.method.model_dump(mode="json", exclude_defaults=True)
    found = []
    for table in _tables():
        for row in table["rows"] if table["dataset"] == _data_set(config) else ():
            if sorted(row["networks"]) != sorted(kinds):
                continue
            keys = {key: _Key.parsed(key) for key in row if key != "networks"}
            told_apart = {name for key in keys.values() for name in key.options}
            mine = {name: str(options[name]) for name in told_apart if name in options}
            for key, wanted in keys.items():
                of_peers = wanted.peers in (None, len(networks))
                if wanted.method == config.method.name and of_peers and wanted.options == mine:
                    found.append(_figure(table, [row["networks"].index(kind) for kind in kinds], row[key]))
    return found


def _data_set(config: RunConfig) -> str:
    data = config.data
    # Nothing says of a folder of photos what is in it but its name.
    return "imagenet" if data.dataset == "image_folder" and "imagenet" in str(data.folder).lower() else data.dataset


@dataclass(frozen=True)
class _Key:
    """METHOD, METHOD@PEERS or METHOD@PEERS OPTION=VALUE."""

    method: str
    peers: int | None
    options: dict[str, str]

    @classmethod
    def parsed(cls, key: str) -> _Key:
        head, *options = key.split()
        method, _, peers = head.partition("@")
        return cls(method, int(peers) if peers else None, dict(option.split("=", 1) for option in options))


def _figure(table: dict[str, Any], order: list[int], value: Any) -> Figure:
    value, _, deviation = value.partition("±") if isinstance(value, str) else (value, "", "")
    values = [value[i] for i in order] if isinstance(value, list) else [float(value)]
    return Figure(tuple(values), float(deviation) if deviation else None, table["source"], table["what"])


@functools.cache
def _tables() -> list[dict[str, Any]]:
    tables: list[dict[str, Any]] = yaml.safe_load(Path(__file__).with_name("published.yaml").read_text("utf-8"))
    return tables

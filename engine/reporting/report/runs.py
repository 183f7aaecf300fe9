"""What a report knows of one run."""

from __future__ import annotations

import functools
import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from engine.config import PeerConfig, RunConfig
from engine.config.loading import load_run
from engine.files import read_text
from engine.reporting.report.table import deployed_network, evaluations
from engine.reporting.tracking import read_metrics

When = Literal["last", "best"]


@dataclass(frozen=True)
class Labels:
    """What a sweep calls a run; None: it is not of one."""

    method: str | None = None
    network: str | None = None
    override: str | None = None
    meant: tuple[str, ...] = ()
    """Keys in which it differs from others on purpose."""


@dataclass(frozen=True)
class Run:
    """A run that has been evaluated at least once."""

    folder: Path
    config: RunConfig
    labels: Labels
    scores: list[dict[str, Any]]
    """Its lines of metrics that hold an evaluation."""
    lines: list[dict[str, Any]] = field(repr=False)
    """Those about training."""

    @property
    def finished(self) -> bool:
        """Whether the last evaluation is that of its last step."""
        train, last = self.config.train, self.scores[-1]
        return bool(last["step"] >= train.max_steps if train.max_steps else last["epoch"] >= (train.epochs or 0))

    @functools.cached_property
    def kinds(self) -> dict[str, list[str]]:
        """The networks that learn, each with the names of its peers."""
        found: dict[str, list[str]] = {}
        for name, peer in self.config.trained:
            if peer.learns:
                found.setdefault(kind_of(peer), []).append(name)
        return found

    def measures(self) -> dict[str, list[float]]:
        """Top-1 in percent at each evaluation, by what it is of: `deployed`, `mean` (of the peers), `NETWORK` where
        there are several, `ema` (mean of the averages), `ensemble`."""
        found: dict[str, list[float]] = {}
        for scores in self.scores:
            for name, value in self._measured(scores).items():
                found.setdefault(name, []).append(value)
        return found

    def _measured(self, scores: Mapping[str, Any]) -> dict[str, float]:
        learners = self.config.learners

        def mean(prefix: str, names: list[str]) -> float:
            return sum(scores[f"{prefix}/{name}/top1"] for name in names) / len(names)

        values = {"deployed": deployed_network(self.config, scores)[1], "mean": mean("val", learners)}
        if len(self.kinds) > 1:
            values |= {kind: mean("val", names) for kind, names in self.kinds.items()}
        if all(f"ema/{name}/top1" in scores for name in learners):
            values["ema"] = mean("ema", learners)
        if len(self.config.trained) > 1:
            values["ensemble"] = scores["val/ensemble/top1"]
        return values

    def peers(self) -> dict[str, list[float]]:
        """Top-1 in percent of each peer, of its average and of its best exit at each evaluation."""
        names = [name for name, _ in self.config.trained]
        keys = {name: f"val/{name}/top1" for name in names}
        keys |= {f"{name} (average)": f"ema/{name}/top1" for name in names if f"ema/{name}/top1" in self.scores[-1]}
        exits = {f"{name} (best exit)": f"val/{name}/best_exit" for name in names}
        keys |= {shown: key for shown, key in exits.items() if key in self.scores[-1]}
        return {shown: [scores[key] for scores in self.scores if key in scores] for shown, key in keys.items()}

    @property
    def deployed(self) -> str:
        """Whose accuracy stands for the run, in words."""
        return deployed_network(self.config, self.scores[-1])[0]

    @functools.cached_property
    def starts(self) -> list[dict[str, Any]]:
        """Command, revision, machine and versions of each start; [] where that cannot be read."""
        try:
            found = json.loads(read_text(self.folder / "starts.json"))
        except (OSError, ValueError):
            return []
        return [start for start in found if isinstance(start, dict)] if isinstance(found, list) else []

    def cost(self) -> dict[str, float]:
        """Of a step: milliseconds in all (`step`) and in its parts, the median of the lines of metrics; `peak_mib`, the
        most memory that rank 0 has had."""
        found: dict[str, list[float]] = {}
        for line in self.lines:
            if speed := line.get("speed/images_per_second"):
                found.setdefault("step", []).append(1000 * self.config.data.global_batch / speed)
            for key, value in line.items():
                if key.startswith("speed/") and key.endswith("_ms") and value is not None:
                    found.setdefault(key[len("speed/") : -len("_ms")], []).append(value)
        cost = {name: sorted(values)[len(values) // 2] for name, values in found.items()}
        peaks = [line["speed/peak_mib"] for line in self.lines if line.get("speed/peak_mib")]
        return cost | ({"peak_mib": max(peaks)} if peaks else {})


def at(values: list[float], when: When) -> float:
    """A measure at the last evaluation, or at its own best."""
    return values[-1] if when == "last" else max(values)


def kind_of(peer: PeerConfig) -> str:
    """What network a peer has, in words that are the same for the same network."""
    options = ", ".join(f"{key}={value}" for key, value in sorted(peer.options.items()))
    return f"{peer.network} ({options})" if options else peer.network


def read_run(folder: Path, labels: Labels | None = None) -> Run:
    """Reads a run's folder. Raises: FileNotFoundError, where it holds no evaluated run."""
    scores = evaluations(folder)
    lines = [line for line in read_metrics(folder) if "lr" in line]
    finite = [{key: math.nan if value is None else value for key, value in line.items()} for line in scores]
    return Run(folder, load_run(folder), labels or Labels(), finite, lines)

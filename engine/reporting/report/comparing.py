"""Which runs may be compared, and what comes of it: rows of one method each, in groups of one network each."""

from __future__ import annotations

import difflib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from engine.config import ConfigError
from engine.config.identity import differences, identity
from engine.reporting.report.published import Figure, published
from engine.reporting.report.runs import Run, When, at, kind_of
from engine.reporting.report.statistics import Gain, Spread, paired_gain, spread_of


@dataclass(frozen=True)
class Row:
    """Runs that differ in their seed alone."""

    method: str
    """What it is called here."""
    runs: list[Run]

    @property
    def finished(self) -> list[Run]:
        """Those that count."""
        return [run for run in self.runs if run.finished]

    def by_seed(self, measure: str, when: When) -> dict[int, float]:
        """Of the finished runs; the mean where a seed was run several times."""
        found: dict[int, list[float]] = {}
        for run in self.finished:
            if values := run.measures().get(measure):
                found.setdefault(run.config.seed, []).append(at(values, when))
        return {seed: sum(values) / len(values) for seed, values in found.items()}

    def spread(self, measure: str, when: When) -> Spread | None:
        """Over the seeds."""
        return spread_of(list(self.by_seed(measure, when).values()))

    def peers(self) -> dict[str, tuple[Spread, Spread]]:
        """Of each peer, of its average and of its best exit: at the last evaluation, and at its best."""
        found: dict[str, list[list[float]]] = {}
        for run in self.finished:
            for name, values in run.peers().items():
                found.setdefault(name, []).append(values)
        spreads = {}
        for name, runs in found.items():
            last, best = (spread_of([at(values, when) for values in runs]) for when in ("last", "best"))
            if last and best:
                spreads[name] = (last, best)
        return spreads

    def cost(self) -> dict[str, float]:
        """The mean over runs of `Run.cost`."""
        found: dict[str, list[float]] = {}
        for run in self.runs:
            for name, value in run.cost().items():
                found.setdefault(name, []).append(value)
        return {name: sum(values) / len(values) for name, values in found.items()}

    def published(self) -> list[Figure]:
        """What was published of this method with these networks on these data."""
        return published(self.runs[0].config)


@dataclass(frozen=True)
class Group:
    """Rows whose recipe is the same, but for what is meant to differ."""

    title: str
    rows: list[Row]
    differs: dict[str, dict[str, Any]]
    """What is meant to differ beside method and seed: {key: {method: value}}."""

    @property
    def baseline(self) -> Row | None:
        """The row of networks that train alone."""
        return next((row for row in self.rows if row.runs[0].config.method.name == "independent"), None)

    def gain(self, row: Row, measure: str, when: When) -> Gain | None:
        """Over the baseline, seed by seed; the ensemble's over one of as many peers."""
        base = self.baseline
        if base is None or base is row:
            return None
        peers = [len(each.runs[0].config.trained) for each in (row, base)]
        if measure == "ensemble" and peers[0] != peers[1]:
            return None
        return paired_gain(row.by_seed(measure, when), base.by_seed(measure, when))

    @property
    def kinds(self) -> list[str]:
        """Its networks, where they are several."""
        kinds = list(self.rows[0].runs[0].kinds)
        return kinds if len(kinds) > 1 else []


def compare(runs: Sequence[Run], may_differ: Sequence[str] = ()) -> list[Group]:
    """Puts runs side by side.

    Args:
        may_differ: keys, or sections, in which runs of one group may differ; those that a sweep file itself sets for a
            method may anyway.

    Raises:
        ConfigError: a key in which two runs differ without that being meant, with both values.
    """
    groups: dict[tuple[str, str | None], list[Run]] = {}
    for run in runs:
        network = " + ".join(run.kinds)
        data = run.config.data
        title = f"{network}, {data.dataset}" + (f" ({data.folder.name})" if data.dataset == "image_folder" else "")
        groups.setdefault((title, run.labels.override), []).append(run)
    known = {key for run in runs for key in _flat(recipe(run))}
    for key in may_differ:
        if not any(_within(each, [key]) for each in known):
            near = difflib.get_close_matches(key, known, n=1, cutoff=0.5)
            hint = f"; did you mean {near[0]!r}?" if near else ""
            raise ConfigError(f"--may-differ {key}: no key of these runs{hint}")
    made = []
    for (title, override), members in groups.items():
        labels = [run.labels.network for run in members if run.labels.network]
        shown = f"{labels[0]}: {title}" if labels else title
        differs = _differing(members, may_differ)
        made.append(Group(f"{shown}, {override}" if override else shown, _rows(members), differs))
    return made


def recipe(run: Run) -> dict[str, Any]:
    """What of a run's config has to be the same for methods to be compared: all that numbers depend on but the method,
    the seed, how many peers there are and where they live; and when it ends and is evaluated."""
    config = run.config
    raw = identity(config)
    for key in ("method", "seed", "placement"):
        raw.pop(key, None)
    raw["peers"] = {
        kind_of(peer): {
            "pretrained": peer.pretrained,
            "optimizer": peer.optimizer.model_dump(mode="json"),
            "frozen": list(peer.frozen_parts),
        }
        for _, peer in config.trained
        if peer.learns
    }
    raw["train"] |= {"epochs": config.train.epochs, "max_steps": config.train.max_steps}
    looks = config.evaluation
    raw["evaluation"] = {"every_epochs": looks.every_epochs, "every_steps": looks.every_steps}
    return raw


def _differing(runs: Sequence[Run], may_differ: Sequence[str]) -> dict[str, dict[str, Any]]:
    meant = {*may_differ, *(key for run in runs for key in run.labels.meant)}
    first = recipe(runs[0])
    wrong: dict[str, str] = {}
    keys: dict[str, None] = {}
    for run in runs[1:]:
        for key, (one, other) in differences(first, recipe(run)).items():
            keys[key] = None
            if not _within(key, meant):
                wrong.setdefault(key, f"  {key}: {one!r} in {runs[0].folder}, {other!r} in {run.folder}")
    if wrong:
        lines = "\n".join(wrong.values())
        raise ConfigError(
            f"these runs differ in more than method, peers and seed, and cannot be compared:\n{lines}\n"
            f"expected runs of one recipe; if a difference is meant, --may-differ {next(iter(wrong))} reports it "
            "beside the numbers"
        )
    return {key: {_name_of(run): _flat(recipe(run)).get(key) for run in runs} for key in keys}


def _within(key: str, sections: Sequence[str] | set[str]) -> bool:
    return any(key == section or key.startswith(f"{section}.") for section in sections)


def _flat(raw: Any, key: str = "") -> dict[str, Any]:
    if not isinstance(raw, dict) or not raw:
        return {key: raw}
    found: dict[str, Any] = {}
    for name, inner in raw.items():
        found |= _flat(inner, f"{key}.{name}" if key else str(name))
    return found


def _rows(runs: Sequence[Run]) -> list[Row]:
    rows: dict[str, list[Run]] = {}
    sizes: dict[str, set[str]] = {}
    for run in runs:
        sizes.setdefault(run.config.method.name, set()).add(_peers(run))
    for run in runs:
        name = _name_of(run)
        if not run.labels.method and len(sizes[run.config.method.name]) > 1:
            name += f", {_peers(run)}"
        rows.setdefault(name, []).append(run)
    return [Row(name, members) for name, members in rows.items()]


def _name_of(run: Run) -> str:
    """A sweep's own name of the row, else the method's with what of its options is not the default."""
    if run.labels.method:
        return run.labels.method
    method = run.config.method
    options = method.model_dump(exclude_defaults=True)
    shown = ", ".join(f"{key}={value}" for key, value in options.items() if key != "name")
    return f"{method.name} ({shown})" if shown else method.name


def _peers(run: Run) -> str:
    count = len(run.config.trained)
    frozen = count - len(run.config.learners)
    return f"{count} peer{'s' * (count > 1)}" + (f", {frozen} frozen" if frozen else "")

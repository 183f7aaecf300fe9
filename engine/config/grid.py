"""What a sweep is: methods x networks x overrides x seeds, each combination a run of its own."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

from pydantic import Field, TypeAdapter, ValidationError, model_validator

from engine.config import ConfigError, RunConfig
from engine.config.explaining import explain, nearest
from engine.config.loading import merge, read_alone, read_with_base, with_overrides
from engine.config.sections import Section

_NAME = r"^[A-Za-z0-9][A-Za-z0-9_.-]*$"
_Name = Annotated[str, Field(pattern=_NAME)]
_Seed = Annotated[int, Field(ge=0, lt=2**63)]
_Sections = dict[str, Any]


class Rule(Section):
    """What is different in some of the runs."""

    methods: list[str] | None = Field(None, description="of these methods; null, here and below: of all")
    networks: list[str] | None = Field(None, description="and these networks")
    overrides: list[str] | None = Field(None, description="and these overrides")
    config: _Sections = Field({}, description="sections over all others")
    skip: bool = Field(False, description="these combinations are not run")


class Grid(Section):
    """A sweep file."""

    name: str = Field(pattern=_NAME, description="the sweep's name; wandb groups its runs by it")
    about: str = Field("", description="what it is, for whoever reads its report")
    dir: Path | None = Field(None, strict=False, description="where its runs lie; null: runs/NAME")
    base: str | None = Field(None, description="the config that all runs inherit from, relative to this file")
    config: _Sections = Field({}, description="sections over those of base, common to all runs")
    peers: list[_Sections] = Field(
        [{"copies": 2}],
        min_length=1,
        description="a number, or a list: peers of a cohort, each with its row's network; a method may have its own",
    )
    methods: dict[_Name, _Sections] = Field(
        min_length=1,
        description="sections by the name of a row; without method.name that is the row's; peers: as above",
    )
    networks: dict[_Name, _Sections] = Field(
        {}, description="a network, a peer with options, or a list: the peers of a cohort of different networks"
    )
    overrides: dict[_Name, _Sections] = Field({}, description="further sections by name, such as rates to be tried")
    seeds: list[_Seed] = Field([0], min_length=1, max_length=10_000, description="their number, from 0, or a list")
    where: list[Rule] = Field([], description="what is different in some of the runs")
    ranks: int = Field(1, ge=1, description="processes of a run")

    @model_validator(mode="after")
    def _rules_are_of_what_is_there(self) -> Grid:
        for index, rule in enumerate(self.where):
            for axis in ("methods", "networks", "overrides"):
                for name in getattr(rule, axis) or ():
                    valid = list(getattr(self, axis))
                    if name not in valid:
                        raise ValueError(
                            f"where.{index}.{axis}: {name!r}: expected one of {', '.join(valid)}{nearest(name, valid)}"
                        )
        twice = sorted({seed for seed in self.seeds if self.seeds.count(seed) > 1})
        if twice:
            raise ValueError(f"seeds: {twice[0]} stands twice; expected each once")
        for key in ("name", "dir", "seed"):
            for where, sections in self._all_sections():
                if key in sections:
                    raise ValueError(f"{where}.{key}: each run of a sweep has its own; expected no {key}")
        return self

    def _all_sections(self) -> Iterator[tuple[str, Mapping[str, Any]]]:
        yield "config", self.config
        for axis in ("methods", "overrides"):
            yield from ((f"{axis}.{name}", sections) for name, sections in getattr(self, axis).items())
        yield from ((f"where.{index}.config", rule.config) for index, rule in enumerate(self.where))

    @property
    def folder(self) -> Path:
        """Where the runs of the sweep lie, a folder each."""
        return self.dir.expanduser() if self.dir else Path("runs") / self.name


@dataclass(frozen=True)
class Cell:
    """One run of a sweep."""

    name: str
    """METHOD-NETWORK-OVERRIDE-seedN, without the axes that the sweep does not have; the name of its folder too."""
    method: str
    network: str | None
    override: str | None
    seed: int
    config: RunConfig
    meant: tuple[str, ...]
    """Keys of the config in which runs of this row differ from others of the sweep because the file says so."""


def read_grid(path: Path, seeds: Sequence[int] | None = None) -> Grid:
    """Reads a sweep file.

    Args:
        seeds: in the place of those of the file.

    Raises:
        ConfigError: naming every wrong key, its value, what was expected and the nearest valid choice.
    """
    raw = read_alone(path)
    if seeds is not None:
        raw["seeds"] = list(seeds)
    try:
        return TypeAdapter(Grid).validate_python(_written_out(raw))
    except ValidationError as error:
        raise ConfigError("\n".join(f"{path}: {explain(details, raw, Grid)}" for details in error.errors())) from None


def _written_out(raw: Mapping[str, Any]) -> dict[str, Any]:
    """What people may write shorter: a number for a list, a name for a section, nothing for an empty section."""

    def number(value: Any) -> bool:
        return isinstance(value, int) and not isinstance(value, bool)

    full = dict(raw)
    if number(raw.get("seeds")):
        full["seeds"] = list(range(min(raw["seeds"], 10_001)))
    full |= {"peers": _slots(raw["peers"])} if "peers" in raw else {}
    for axis in ("methods", "networks", "overrides"):
        if isinstance(raw.get(axis), dict):
            full[axis] = {name: {} if value is None else value for name, value in raw[axis].items()}
    if isinstance(raw.get("networks"), dict):
        full["networks"] = {
            name: {"peers": _slots(value)} if isinstance(value, list) else _slots([value])[0]
            for name, value in raw["networks"].items()
        }
    return full


def _slots(value: Any) -> Any:
    """Peers as a list of sections: `3` is three of a kind, and a word the network of one."""
    if isinstance(value, int) and not isinstance(value, bool):
        return [{"copies": value}]
    if isinstance(value, list):
        return [{"network": each} if isinstance(each, str) else each for each in value]
    return value


def cells_of(grid: Grid, path: Path, overrides: Sequence[str] = ()) -> list[Cell]:
    """The runs of a sweep, in the order of its file, seeds last.

    Args:
        path: of its file.
        overrides: `section.key=value` over all that stands there.

    Raises:
        ConfigError: each line names the run.
    """
    for word in overrides:
        if (key := word.partition("=")[0]) in ("name", "dir", "seed"):
            raise ConfigError(f"{word}: each run of a sweep has its own; expected no {key}")
    base = read_with_base(path.parent / grid.base) if grid.base else {}
    cells: dict[str, Cell] = {}
    wrong: dict[str, list[str]] = {}
    for method, network, override in _rows(grid):
        rules = [rule for rule in grid.where if _matches(rule, method, network, override)]
        if any(rule.skip for rule in rules):
            continue
        row = "-".join(part for part in (method, network, override) if part)
        try:
            config = with_overrides({"name": row} | _compose(grid, base, method, network, override, rules), overrides)
        except ConfigError as error:
            for line in str(error).splitlines():
                wrong.setdefault(line, []).append(row)
            continue
        own = [{k: v for k, v in grid.methods[method].items() if k != "peers"}, *(rule.config for rule in rules)]
        meant = tuple(sorted({key for sections in own for key in _leaves(sections)}))
        for seed in grid.seeds:
            name = f"{row}-seed{seed}"
            if name in cells:
                raise ConfigError(f"{path}: two runs would be called {name}; expected other names of rows")
            its = {"name": f"{grid.name}-{name}", "dir": grid.folder / name, "seed": seed}
            cells[name] = Cell(name, method, network, override, seed, config.model_copy(update=its), meant)
    if wrong:
        raise ConfigError("\n".join(said_of(names, line) for line, names in wrong.items()))
    if not cells:
        raise ConfigError(f"{path}: where: skips all runs; expected one that is run")
    return list(cells.values())


def said_of(names: Sequence[str], line: str) -> str:
    """A mistake that some runs have in common."""
    return f"{names[0]}{f' and {len(names) - 1} more' * (len(names) > 1)}: {line}"


def _rows(grid: Grid) -> Iterator[tuple[str, str | None, str | None]]:
    for override in grid.overrides or (None,):
        for network in grid.networks or (None,):
            for method in grid.methods:
                yield method, network, override


def _matches(rule: Rule, method: str, network: str | None, override: str | None) -> bool:
    wanted = ((rule.methods, method), (rule.networks, network), (rule.overrides, override))
    return all(names is None or name in names for names, name in wanted)


def _compose(
    grid: Grid, base: Mapping[str, Any], method: str, network: str | None, override: str | None, rules: Sequence[Rule]
) -> dict[str, Any]:
    own = dict(grid.methods[method])
    peers = own.pop("peers", None)
    if isinstance(own.get("method", {}), dict):
        own["method"] = {"name": method, **own.get("method", {})}
    raw = merge(merge(base, grid.config), own)
    if network is not None:
        raw["peers"] = _peers(grid.networks[network], grid.peers if peers is None else _slots(peers))
    elif peers is not None:
        raw["peers"] = peers
    for sections in (grid.overrides[override] if override else {}, *(rule.config for rule in rules)):
        raw = merge(raw, sections)
    return raw


def _peers(network: _Sections, slots: Any) -> Any:
    """The peers of a run: those of a row of different networks, or slots that the network of the row fills."""
    if "peers" in network:
        return network["peers"]
    if not isinstance(slots, list):
        return slots
    return [{**network, **slot} if isinstance(slot, dict) else slot for slot in slots]


def _leaves(sections: Any, key: str = "") -> Iterator[str]:
    """The keys of all values in sections within sections."""
    if isinstance(sections, dict) and sections:
        for name, inner in sections.items():
            yield from _leaves(inner, f"{key}.{name}" if key else str(name))
    elif key:
        yield key

"""Config files: reading them with what they inherit, and telling whoever wrote one what is wrong with it."""

from __future__ import annotations

import difflib
import os
import re
import typing
from collections.abc import Mapping, Sequence
from datetime import date
from pathlib import Path
from typing import Any

import yaml
from pydantic import BaseModel, TypeAdapter, ValidationError

from data_pipelines.config import with_moved_keys
from engine.config import ConfigError, PeerConfig, RunConfig
from engine.config.explaining import explain, section_of
from engine.config.own_images import with_own_images
from losses import METHODS

MAX_BYTES = 1 << 20
"""The largest config that is read."""

MAX_VALUES = 100_000
"""The most values that a config may stand for, each alias counted as what it stands for."""

MAX_DEPTH = 50
"""How deep a config may be nested."""


MAX_DIGITS = 400
"""The longest number that is read: more than any that can be meant, and far fewer than take seconds to convert."""


class _Loader(yaml.SafeLoader):
    """YAML as people write it: 1e-4 is a number, and a key that stands twice is a mistake rather than silently lost.

    What would be too much for those who look at the values later is refused: text that no path or file can hold, values
    within values without end, and aliases that stand for more than memory holds.
    """

    def get_single_node(self) -> Any:
        self._depth = 0
        self._sizes: dict[int, int] = {}
        return super().get_single_node()

    def compose_node(self, parent: Any, index: Any) -> Any:
        event = self.peek_event()
        mark = event.start_mark
        self._depth += 1
        if self._depth > MAX_DEPTH:
            raise ConfigError(f"{mark.name}:{mark.line + 1}: nested more than {MAX_DEPTH} deep")
        node = super().compose_node(parent, index)
        self._depth -= 1
        if id(node) not in self._sizes:
            if isinstance(event, yaml.AliasEvent):
                raise ConfigError(
                    f"{mark.name}:{mark.line + 1}: alias {event.anchor!r} stands within what it stands for"
                )
            inner = node.value if isinstance(node, yaml.CollectionNode) else []
            flat = [item for entry in inner for item in (entry if isinstance(entry, tuple) else (entry,))]
            self._sizes[id(node)] = 1 + sum(self._sizes.get(id(item), MAX_VALUES) for item in flat)
        if self._sizes[id(node)] > MAX_VALUES:
            raise ConfigError(f"{mark.name}:{mark.line + 1}: stands for more than {MAX_VALUES} values, by its aliases")
        return node

    def construct_scalar(self, node: Any) -> Any:
        value = super().construct_scalar(node)
        if node.tag in ("tag:yaml.org,2002:int", "tag:yaml.org,2002:float") and len(value) > MAX_DIGITS:
            where = f"{node.start_mark.name}:{node.start_mark.line + 1}"
            raise ConfigError(f"{where}: a number of {len(value)} characters; expected at most {MAX_DIGITS}")
        if re.search("[\0\ud800-\udfff]", value):
            where = f"{node.start_mark.name}:{node.start_mark.line + 1}"
            raise ConfigError(f"{where}: {value!r}: expected text that can be written to a file")
        return value

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen: set[str] = set()
        for key, _ in node.value if isinstance(node, yaml.MappingNode) else ():
            name = str(key.value)
            if name in seen:
                raise ConfigError(f"{key.start_mark.name}:{key.start_mark.line + 1}: key {name!r} stands twice")
            seen.add(name)
        return super().construct_mapping(node, deep)


_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"^[-+]?[0-9]+(\.[0-9]*)?[eE][-+]?[0-9]+$"), list("-+0123456789")
)


def load(path: str | Path, overrides: Sequence[str] = ()) -> RunConfig:
    """Reads a config file with everything it inherits, applies `section.key=value` overrides and validates the whole.

    The folder of a run, or the config.yaml in it, means that run, as `load_run`.

    Raises:
        ConfigError: naming every wrong key, its value, what was expected and the nearest valid choice.
    """
    run = Path(path) if Path(path).is_dir() else Path(path).parent
    means_run = run == Path(path) or Path(path).name == "config.yaml"
    if means_run and (run / "config.yaml").is_file() and (run / "starts.json").is_file():
        config = load_run(run, overrides)
        if config.placement.peer not in (None, run.resolve().name):
            raise ConfigError(f"{run}: holds the run of {config.placement.peer}; expected a folder of that name")
        return config
    return with_overrides(read_with_base(Path(path)), overrides)


def load_run(run: Path, overrides: Sequence[str] = ()) -> RunConfig:
    """The config that a run has written into its folder, by this version or by one whose keys stood elsewhere.

    Wherever the folder was when that was written: `dir` is where it is now, unless an override says otherwise.

    Raises:
        ConfigError: it cannot be read, and as `load`.
    """
    path = run / "config.yaml"
    if path.is_symlink():
        raise ConfigError(f"{path}: a link; expected the file that the run has written")
    raw = read_with_base(path)
    if isinstance(raw.get("data"), dict):
        raw["data"] = with_moved_keys(raw["data"])
    if not any(override.startswith(("dir=", "name=")) for override in overrides):
        placement = raw.get("placement")
        peer = placement.get("peer") if isinstance(placement, dict) else None
        if peer is None or run.resolve().name == peer:
            raw["dir"] = str(run.resolve() if peer is None else run.resolve().parent)
    return with_overrides(raw, overrides)


def with_overrides(raw: dict[str, Any], overrides: Sequence[str]) -> RunConfig:
    """A run of plain data, which is changed, and `section.key=value` over it. Raises: ConfigError, as `load`."""
    for override in overrides:
        key, equals, text = override.partition("=")
        if not equals or not re.fullmatch(r"[A-Za-z_][\w]*(\.\w+)*", key):
            raise ConfigError(f"{override!r}: expected section.key=value, such as train.epochs=10")
        value = _parse(text, f"override {key}")
        # A name of digits, or of a date, is meant as it is written.
        meant = text if _is_text(key) and isinstance(value, int | float | date) else value
        _set(raw, key, meant)
    return validate(raw)


def _is_text(key: str) -> bool:
    """Whether what stands at a key is text, and nothing that is not."""
    *path, last = (part for part in key.split(".") if not part.isdecimal())
    model: type[BaseModel] | None = RunConfig
    for part in path:
        field = model.model_fields.get(part) if model else None
        model = section_of(field.annotation) if field else None
    found = model.model_fields.get(last) if model else None
    return found is not None and set(typing.get_args(found.annotation) or (found.annotation,)) <= {str, type(None)}


def validate(raw: Mapping[str, Any]) -> RunConfig:
    """Makes a run of plain data. Raises: ConfigError, with a line for each mistake."""
    try:
        config = TypeAdapter(RunConfig).validate_python(dict(raw))
        if config.data.image.of_networks:
            config = TypeAdapter(RunConfig).validate_python(with_own_images(config))
        return config
    except ValidationError as error:
        lines = [explain(details, raw) for details in error.errors()]
        raise ConfigError("\n".join(lines)) from None


def dump(config: RunConfig) -> str:
    """The resolved config as YAML that `load` takes."""
    return _yaml(config.model_dump(mode="json"))


def dump_anywhere(config: RunConfig) -> str:
    """The same, of use wherever one stands: paths of data and of weights are absolute."""
    raw = config.model_dump(mode="json")
    if raw["data"].get("root"):
        raw["data"]["root"] = _absolute(raw["data"]["root"])
    if raw["placement"].get("meeting"):
        raw["placement"]["meeting"] = _absolute(raw["placement"]["meeting"])
    for peer in raw["peers"]:
        if isinstance(peer["pretrained"], str):
            peer["pretrained"] = _absolute(peer["pretrained"])
    return _yaml(raw)


def _absolute(path: str) -> str:
    return str(Path(os.path.expanduser(path)).absolute())


def _yaml(raw: Mapping[str, Any]) -> str:
    return yaml.safe_dump(raw, sort_keys=False, allow_unicode=True)


def _parse(text: str, where: str) -> Any:
    try:
        loader = _Loader(text)
        loader.name = where
        return loader.get_single_data()
    except ConfigError:
        raise
    except Exception as error:  # PyYAML's constructors pass on whatever Python makes of a month 13 or of !!bool maybe.
        raise ConfigError(f"{where}: not valid YAML: {' '.join(str(error).split())}") from None


def read_with_base(path: Path, seen: tuple[Path, ...] = ()) -> dict[str, Any]:
    """A config file as plain data, over all that it inherits; nothing is validated yet.

    Args:
        seen: the files that have led to this one.

    Raises:
        ConfigError: it cannot be read, or inherits from itself.
    """
    try:
        path = path.resolve()
    except (OSError, ValueError, RuntimeError) as error:  # A null byte; links in a circle.
        raise ConfigError(f"{path}: cannot be read: {error}") from None
    if path in seen:
        raise ConfigError(f"{path}: inherits from itself through base: {' -> '.join(p.name for p in (*seen, path))}")
    raw = read_alone(path, f" (base of {seen[-1]})" if seen else "")
    base = raw.pop("base", None)
    if base is None:
        return raw
    if not isinstance(base, str):
        raise ConfigError(f"{path}: base = {base!r}: expected the path of another config, relative to this one")
    return merge(read_with_base(path.parent / base, (*seen, path)), raw)


def read_alone(path: Path, by: str = "") -> dict[str, Any]:
    """A YAML file of sections as plain data, `base` a key like any other.

    Args:
        by: said of the file in an error.

    Raises:
        ConfigError: it cannot be read.
    """
    try:
        if path.exists() and not path.is_file() and not path.is_dir():
            raise OSError(0, "Not a file")  # A device or a pipe may have no end.
        with path.open(encoding="utf-8") as file:
            text = file.read(MAX_BYTES + 1)
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "not a text file"
        near = difflib.get_close_matches(path.name, _yaml_names(path.parent), n=1)
        hint = f"; did you mean {near[0]!r}?" if near else ""
        raise ConfigError(f"{path}{by}: cannot be read: {reason}{hint}") from None
    if len(text) > MAX_BYTES:
        raise ConfigError(f"{path}: larger than {MAX_BYTES} bytes; expected a config")
    raw = _parse(text, str(path))
    if not isinstance(raw, dict):
        raise ConfigError(f"{path}: expected sections with keys, found {type(raw).__name__}")
    return raw


def _yaml_names(folder: Path) -> list[str]:
    return [p.name for p in folder.iterdir() if p.suffix in (".yaml", ".yml")] if folder.is_dir() else []


def merge(base: Mapping[str, Any], own: Mapping[str, Any]) -> dict[str, Any]:
    """`own` over `base`, section by section. A section that names another kind of thing starts afresh, since the
    options of the one are not options of the other."""
    merged = dict(base)
    for key, value in own.items():
        old = merged.get(key)
        if isinstance(old, dict) and isinstance(value, dict):
            default = getattr(getattr(RunConfig.model_fields.get(key), "default", None), "name", None)
            before = {"name": old.get("name", default), "dataset": old.get("dataset")}
            renamed = any(before[tag] not in (None, value.get(tag, before[tag])) for tag in before)
            merged[key] = value if renamed else merge(old, value)
        else:
            merged[key] = value
    return merged


def _set(raw: dict[str, Any], key: str, value: Any) -> None:
    *path, last = key.split(".")
    here: Any = raw
    for i, part in enumerate(path):
        where = ".".join(path[: i + 1])
        if isinstance(here, list):
            here = here[_index(here, part, where)]
        else:
            if here.get(part) is None:
                here[part] = {}
            here = here[part]
        if not isinstance(here, dict | list):
            raise ConfigError(f"{key}: {where} = {here!r} has no keys below it")
    if isinstance(here, list):
        here[_index(here, last, key)] = value
    else:
        here[last] = value


def _index(items: list[Any], part: str, where: str) -> int:
    if not part.isdecimal() or int(part) >= len(items):
        valid = f"an index from 0 to {len(items) - 1}" if items else "no index, as the list is empty"
        raise ConfigError(f"{where}: expected {valid}, found {part!r}")
    return int(part)


def describe() -> str:
    """Every key of a config, with its default and what it means."""
    lines: list[str] = []

    def walk(model: type[BaseModel], prefix: str) -> None:
        for name, field in model.model_fields.items():
            inner = section_of(field.annotation)
            if name == "method" and model is RunConfig:
                for method in METHODS.values():
                    walk(method.Options, "method.")
            elif inner is not None:
                walk(inner, f"{prefix}{name}." + ("N." if inner is PeerConfig else ""))
            else:
                default = "" if field.is_required() else f" = {'null' if field.default is None else field.default}"
                meaning = field.description or str(model.__doc__).splitlines()[0]
                lines.append(f"{prefix}{name}{default}\n    {meaning}")

    walk(RunConfig, "")
    return "\n".join(lines)

"""What a run is: strict models of the YAML files, with errors that name the key and the nearest valid choice."""

from __future__ import annotations

import difflib
import functools
import operator
import re
import typing
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, TypeGuard

import yaml
from pydantic import BaseModel, ConfigDict, Field, TypeAdapter, ValidationError, model_validator
from pydantic_core import ErrorDetails

import data_pipelines
import models
from data_pipelines import DataConfig
from losses import METHODS, MethodOptions


class ConfigError(ValueError):
    """Something a user wrote cannot be run. The message is for that user."""


class _Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, allow_inf_nan=False)


if TYPE_CHECKING:
    AnyMethod = MethodOptions
else:
    _options = [method.Options for method in METHODS.values()]
    AnyMethod = Annotated[functools.reduce(operator.or_, _options), Field(discriminator="name")]


class PeerConfig(_Section):
    """One network of the cohort, or several alike."""

    network: str = Field(
        description="a name of ours (cifar_resnet32_b, cifar_wrn_28_10), timm/NAME or torchvision/NAME"
    )
    copies: int = Field(1, ge=1, description="how many peers have this network, each with its own initialisation")
    name: str | None = Field(
        None,
        pattern=r"^[A-Za-z0-9][A-Za-z0-9_.-]*$",
        description="name in logs and files; made from the network if absent",
    )
    options: dict[str, Any] = Field({}, description="arguments of the network, such as width or drop_path_rate")
    pretrained: bool | str = Field(
        False,
        description="true: start from the weights that timm or torchvision publish, which downloads them; or the path "
        "of a file of weights (.safetensors, .pt, .pth)",
    )


class OptimizerConfig(_Section):
    """A timm optimiser; one for each peer."""

    name: str = Field("sgd", description="timm's name: sgd is SGD with Nesterov momentum, momentum is without")
    lr: float = Field(0.1, gt=0, description="learning rate, for the global batch as it is: never rescaled")
    momentum: float = Field(0.9, ge=0, lt=1, description="momentum, for optimisers that have one")
    weight_decay: float = Field(5e-4, ge=0, description="weight decay")
    decay_norm_and_bias: bool = Field(True, description="whether biases and normalisation weights decay too")
    options: dict[str, Any] = Field({}, description="further arguments of the optimiser, such as betas")


class ScheduleConfig(_Section):
    """A timm schedule of the learning rate, stepped at every update."""

    name: Literal["step", "cosine", "constant"] = Field("cosine", description="step falls by gamma at each milestone")
    milestones: list[Annotated[float, Field(gt=0)]] = Field([], description="step: epochs done when the rate falls")
    gamma: float = Field(0.1, gt=0, le=1, description="step: factor at each milestone")
    min_lr: float = Field(0.0, ge=0, description="cosine: where it ends")
    warmup_epochs: float = Field(0, ge=0, description="epochs of linear warm-up at the start")
    warmup_lr: float = Field(1e-5, ge=0, description="where the warm-up starts")

    @model_validator(mode="after")
    def _milestones_belong_to_step(self) -> ScheduleConfig:
        if self.name == "step" and not self.milestones:
            raise ValueError("milestones = []: name = step needs at least one epoch, such as [60, 120, 180]")
        if self.name != "step" and self.milestones:
            raise ValueError(
                f"milestones = {self.milestones}: only name = step has milestones, found name = {self.name}"
            )
        if self.milestones != sorted(set(self.milestones)):
            raise ValueError(f"milestones = {self.milestones}: expected ascending epochs, each once")
        return self


class TrainConfig(_Section):
    """The loop."""

    epochs: int = Field(ge=1, description="passes over the training data")
    accumulation: int = Field(1, ge=1, description="micro-batches of one global batch, one after another on a rank")
    clip_norm: float | None = Field(None, gt=0, description="largest gradient norm of each peer; null: no clipping")
    ema_decay: float | None = Field(None, gt=0, lt=1, description="decay of each peer's moving average; null: none")
    sync_bn: bool = Field(False, description="BatchNorm statistics over the replica group instead of one rank's rows")
    max_skipped: int = Field(20, ge=1, description="non-finite updates in a row that end the run")


class PrecisionConfig(_Section):
    """Number formats and memory layout."""

    amp: Literal["float32", "bf16", "fp16"] = Field(
        "float32", description="autocast of the networks; losses stay float32"
    )
    tf32: bool = Field(True, description="TF32 in float32 matrix products and convolutions on GPUs that have it")
    channels_last: bool = Field(True, description="channels-last memory for images and networks")
    compile: bool = Field(False, description="torch.compile the networks")


class PlacementConfig(_Section):
    """Which rank computes which peer."""

    kind: Literal["auto", "colocated", "spread", "hybrid"] = Field(
        "auto",
        description="colocated: all peers on every rank; spread: one peer a rank; hybrid: peers_per_rank on each; "
        "auto: as few a rank as the number of ranks allows",
    )
    peers_per_rank: int | None = Field(None, ge=1, description="hybrid: peers on each rank, a divisor of their number")
    exchange_dtype: Literal["float32", "bf16"] = Field("float32", description="number format of signals under way")

    @model_validator(mode="after")
    def _peers_per_rank_belongs_to_hybrid(self) -> PlacementConfig:
        if (self.kind == "hybrid") != (self.peers_per_rank is not None):
            raise ValueError(
                f"peers_per_rank = {self.peers_per_rank}: kind = hybrid needs a number of peers, other kinds have "
                f"none; found kind = {self.kind}"
            )
        return self


class EvaluationConfig(_Section):
    """When and how the validation images are counted."""

    every_epochs: int = Field(1, ge=1, description="epochs between evaluations; the last epoch is always evaluated")
    batch: int = Field(500, ge=1, description="validation images in one forward on a rank")


class CheckpointConfig(_Section):
    """What is kept on disk."""

    every_epochs: int = Field(1, ge=1, description="epochs between checkpoints; the last epoch is always saved")
    every_steps: int | None = Field(None, ge=1, description="also every so many steps; null: only at ends of epochs")
    keep: int = Field(2, ge=1, description="newest checkpoints kept, beside the best")


class ReportConfig(_Section):
    """Which network stands for the run."""

    deployed: Literal["first", "best", "mean", "leader", "ema", "ensemble"] | None = Field(
        None,
        description="whose accuracy is the run's in a report: the first peer, the one that is best at the last "
        "evaluation, the mean of all peers, the leader (okddip), the moving average of the first peer, or the mean of "
        "all peers' probabilities; null: what the method's paper reports",
    )


class LogConfig(_Section):
    """What is reported, where."""

    every_steps: int = Field(
        50, ge=1, description="steps of an epoch between lines of metrics; the host waits for the device there"
    )
    progress: bool = Field(True, description="a progress bar with the time that is left")
    wandb: Literal["disabled", "offline", "online"] = Field(
        "disabled", description="wandb's mode; only online uses a network"
    )
    wandb_project: str = Field("cohort", description="wandb's project")
    wandb_timeout: float = Field(30.0, gt=0, description="seconds to wait for wandb before going on without it")


class RunConfig(_Section):
    """A whole run."""

    name: str = Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9_.-]*$", description="the run's name")
    dir: Path | None = Field(None, strict=False, description="the run's folder; null: runs/NAME")
    seed: int = Field(0, ge=0, lt=2**63, description="of initialisation, data order, augmentation and dropout")
    device: Literal["auto", "cpu", "cuda"] = Field("auto", description="auto: cuda where there is one")
    method: AnyMethod
    peers: list[PeerConfig] = Field(min_length=1)
    data: DataConfig
    train: TrainConfig
    optimizer: OptimizerConfig = OptimizerConfig()
    schedule: ScheduleConfig = ScheduleConfig()
    precision: PrecisionConfig = PrecisionConfig()
    placement: PlacementConfig = PlacementConfig()
    evaluation: EvaluationConfig = EvaluationConfig()
    checkpoint: CheckpointConfig = CheckpointConfig()
    log: LogConfig = LogConfig()
    report: ReportConfig = ReportConfig()

    @property
    def folder(self) -> Path:
        """Where the run lives."""
        return self.dir.expanduser() if self.dir else Path("runs") / self.name

    @property
    def deployed(self) -> str:
        """Which network stands for the run: one of the choices of `report.deployed`."""
        return self.report.deployed or METHODS[self.method.name].deployed

    @functools.cached_property
    def cohort(self) -> list[tuple[str, PeerConfig]]:
        """(unique name, config) of each of the K peers, `copies` written out."""
        wanted = [
            (p.name or re.sub(r"[^A-Za-z0-9_.-]", "_", p.network), p) for p in self.peers for _ in range(p.copies)
        ]
        bases = [base for base, _ in wanted]
        return [
            (base if bases.count(base) == 1 else f"{base}-{bases[:i].count(base)}", peer)
            for i, (base, peer) in enumerate(wanted)
        ]

    @model_validator(mode="after")
    def _sections_fit_together(self) -> RunConfig:
        names = [name for name, _ in self.cohort]
        taken = sorted({"ensemble", "cohort"} & set(names))
        if taken:
            raise ValueError(f"peers: name {taken[0]!r} stands for all peers together; expected another name")
        twice = sorted({name for name in names if names.count(name) > 1})
        if twice:
            raise ValueError(f"peers: name {twice[0]!r} is used twice; expected a different name for each peer")
        for index, peer in enumerate(self.peers):
            try:
                models.check(peer.network, peer.options, pretrained=peer.pretrained)
            except ValueError as error:
                raise ValueError(f"peers.{index}: {error}") from None
        try:
            METHODS[self.method.name].check(self.method, len(names))
        except ValueError as error:
            raise ValueError(f"method.name = {self.method.name}: {error}") from None
        if METHODS[self.method.name].one_view and self.data.views != "shared":
            raise ValueError(
                f"data.views = {self.data.views}: {self.method.name} needs one augmentation for all peers; "
                "expected shared"
            )
        if METHODS[self.method.name].trunk(self.method, 3) is not None:
            kinds = {(peer.network, repr(peer.options)) for peer in self.peers}
            if len(kinds) > 1:
                raise ValueError(
                    f"peers: {self.method.name} shares a trunk between peers of one network; found "
                    f"{', '.join(sorted(network for network, _ in kinds))}"
                )
        if METHODS[self.method.name].alike:
            found = {f"{peer.network} {peer.options}" if peer.options else peer.network for peer in self.peers}
            if len(found) > 1:
                raise ValueError(
                    f"peers: {self.method.name} needs peers of one network with the same options; found "
                    f"{', '.join(sorted(found))}"
                )
        if METHODS[self.method.name].held_out(self.method) and not self.data.held_out:
            raise ValueError(
                f"data.held_out = {self.data.held_out}: {self.method.name} as configured looks at images that are not "
                "trained on; expected a part of the training samples, such as 0.1"
            )
        teaches = METHODS[self.method.name].teacher_decay(self.method, 0) is not None
        if teaches and self.train.ema_decay:
            raise ValueError(
                f"train.ema_decay = {self.train.ema_decay}: {self.method.name} keeps moving averages of its own; "
                "expected null"
            )
        if self.deployed == "ema" and not (teaches or self.train.ema_decay):
            raise ValueError("report.deployed = 'ema': there are no moving averages; expected train.ema_decay")
        if self.deployed == "leader" and METHODS[self.method.name].deployed != "leader":
            raise ValueError(f"report.deployed = 'leader': {self.method.name} has none; expected first, best or mean")
        in_turn = len(METHODS[self.method.name].turns(self.method, len(names))) > 1
        if in_turn and self.precision.amp == "fp16":
            raise ValueError(
                "precision.amp = fp16: peers that are updated in turn (method.order = sequential) would scale their "
                "losses differently from rank to rank; expected bf16 or float32"
            )
        if in_turn and self.train.accumulation > 1:
            raise ValueError(
                f"train.accumulation = {self.train.accumulation}: peers that are updated in turn (method.order = "
                "sequential) need a whole batch at once; expected 1"
            )
        if self.schedule.warmup_epochs > self.train.epochs:
            raise ValueError(
                f"schedule.warmup_epochs = {self.schedule.warmup_epochs}: expected at most train.epochs = "
                f"{self.train.epochs}"
            )
        if self.schedule.milestones and self.schedule.milestones[-1] >= self.train.epochs:
            raise ValueError(
                f"schedule.milestones = {self.schedule.milestones}: the last lies at or after the end of training, "
                f"expected epochs below train.epochs = {self.train.epochs}"
            )
        return self


# -- reading ----------------------------------------------------------------------------------------------------------


class _Loader(yaml.SafeLoader):
    """YAML as people write it: 1e-4 is a number, and a key that stands twice is a mistake rather than silently lost."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen: set[str] = set()
        for key, _ in node.value:
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

    Raises:
        ConfigError: naming every wrong key, its value, what was expected and the nearest valid choice.
    """
    raw = _read(Path(path), ())
    for override in overrides:
        key, equals, text = override.partition("=")
        if not equals or not re.fullmatch(r"[A-Za-z_][\w]*(\.\w+)*", key):
            raise ConfigError(f"{override!r}: expected section.key=value, such as train.epochs=10")
        _set(raw, key, _parse(text, f"override {key}"))
    return validate(raw)


def validate(raw: Mapping[str, Any]) -> RunConfig:
    """Makes a run of plain data. Raises: ConfigError, with a line for each mistake."""
    try:
        return TypeAdapter(RunConfig).validate_python(dict(raw))
    except ValidationError as error:
        lines = [_explain(details, raw) for details in error.errors()]
        raise ConfigError("\n".join(lines)) from None


def dump(config: RunConfig) -> str:
    """The resolved config as YAML that `load` takes."""
    return yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False, allow_unicode=True)


def _parse(text: str, where: str) -> Any:
    try:
        loader = _Loader(text)
        loader.name = where
        return loader.get_single_data()
    except yaml.YAMLError as error:
        raise ConfigError(f"{where}: not valid YAML: {' '.join(str(error).split())}") from None


def _read(path: Path, seen: tuple[Path, ...]) -> dict[str, Any]:
    path = path.resolve()
    if path in seen:
        raise ConfigError(f"{path}: inherits from itself through base: {' -> '.join(p.name for p in (*seen, path))}")
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        by = f" (base of {seen[-1]})" if seen else ""
        reason = error.strerror if isinstance(error, OSError) else "not a text file"
        near = difflib.get_close_matches(path.name, _yaml_names(path.parent), n=1)
        hint = f"; did you mean {near[0]!r}?" if near else ""
        raise ConfigError(f"{path}{by}: cannot be read: {reason}{hint}") from None
    raw = _parse(text, str(path))
    if not isinstance(raw, dict):
        raise ConfigError(f"{path}: expected sections with keys, found {type(raw).__name__}")
    base = raw.pop("base", None)
    if base is None:
        return raw
    if not isinstance(base, str):
        raise ConfigError(f"{path}: base = {base!r}: expected the path of another config, relative to this one")
    return _merge(_read(path.parent / base, (*seen, path)), raw)


def _yaml_names(folder: Path) -> list[str]:
    return [p.name for p in folder.iterdir() if p.suffix in (".yaml", ".yml")] if folder.is_dir() else []


def _merge(base: dict[str, Any], own: dict[str, Any]) -> dict[str, Any]:
    """`own` over `base`, section by section. A section that names another kind of thing starts afresh, since the
    options of the one are not options of the other."""
    merged = dict(base)
    for key, value in own.items():
        old = merged.get(key)
        if isinstance(old, dict) and isinstance(value, dict):
            default = getattr(getattr(RunConfig.model_fields.get(key), "default", None), "name", None)
            before = {"name": old.get("name", default), "dataset": old.get("dataset")}
            renamed = any(before[tag] not in (None, value.get(tag, before[tag])) for tag in before)
            merged[key] = value if renamed else _merge(old, value)
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


# -- explaining -------------------------------------------------------------------------------------------------------

_EXPECTED = {
    "int_type": "an integer",
    "int_from_float": "an integer",
    "float_type": "a number",
    "bool_type": "true or false",
    "string_type": "text",
    "list_type": "a list",
    "tuple_type": "a list",
    "dict_type": "keys with values",
    "model_type": "a section with keys",
    "model_attributes_type": "a section with keys",
    "path_type": "a path",
    "finite_number": "a finite number",
    "invalid_key": "text as a key",
}


def _explain(error: ErrorDetails, raw: Mapping[str, Any]) -> str:
    kind, context, value = error["type"], error.get("ctx", {}), error["input"]
    loc = [
        part for i, part in enumerate(error["loc"]) if not (i == 1 and error["loc"][0] == "method" and part in METHODS)
    ]
    key = ".".join(str(part) for part in loc)
    if kind == "extra_forbidden":
        valid = sorted(_fields(loc[:-1], raw))
        section = ".".join(str(part) for part in loc[:-1]) or "a config"
        return f"{key} = {value!r}: unknown key{_nearest(str(loc[-1]), valid)}; {section} has: {', '.join(valid)}"
    if kind == "missing":
        return f"{key}: missing; expected a value"
    if kind in ("union_tag_not_found", "union_tag_invalid"):
        name = value.get("name") if isinstance(value, dict) else value
        return f"{key}.name = {name!r}: expected one of {', '.join(METHODS)}{_nearest(str(name), list(METHODS))}"
    if kind == "literal_error":
        valid = re.findall(r"'([^']*)'", str(context["expected"]))
        return f"{key} = {value!r}: expected one of {', '.join(valid)}{_nearest(str(value), valid)}"
    if kind == "value_error":
        return f"{key}.{context['error']}" if key else str(context["error"])
    if kind == "string_pattern_mismatch":
        return f"{key} = {value!r}: expected letters, digits, '.', '_' and '-', starting with a letter or digit"
    if kind == "too_short":
        return f"{key} = {value!r}: expected at least {context['min_length']} item{'s' * (context['min_length'] > 1)}"
    if kind in ("greater_than", "greater_than_equal", "less_than", "less_than_equal"):
        return f"{key} = {value!r}: expected a value {error['msg'].removeprefix('Input should be ')}"
    expected = _EXPECTED.get(kind) or error["msg"].removeprefix("Input should be ").removeprefix("Value should be ")
    return f"{key} = {value!r}: expected {expected}"


def _nearest(word: str, choices: Sequence[str]) -> str:
    near = difflib.get_close_matches(word, choices, n=1, cutoff=0.5)
    return f"; did you mean {near[0]!r}?" if near else ""


def _fields(loc: Sequence[int | str], raw: Mapping[str, Any]) -> Iterator[str]:
    """The valid keys of the section at `loc`."""
    if list(loc[:1]) == ["method"]:
        section = raw["method"]
        yield from METHODS[section["name"]].Options.model_fields
        return
    model: type[BaseModel] = RunConfig
    for part in loc:
        if isinstance(part, str):
            annotation = model.model_fields[part].annotation
            model = next(t for t in (annotation, *typing.get_args(annotation)) if _is_section(t))
    yield from model.model_fields


def check_data(config: RunConfig) -> None:
    """Looks at what is on disk, before any device is touched. Raises: ConfigError."""
    try:
        data_pipelines.check(config.data)
    except (data_pipelines.DataError, ImportError) as error:
        word = str(error).partition(":")[0]
        raise ConfigError(f"data{'.' if word in DataConfig.model_fields else ': '}{error}") from None


def describe() -> str:
    """Every key of a config, with its default and what it means."""
    lines: list[str] = []

    def walk(model: type[BaseModel], prefix: str) -> None:
        for name, field in model.model_fields.items():
            inner = next((t for t in (field.annotation, *typing.get_args(field.annotation)) if _is_section(t)), None)
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


def _is_section(annotation: Any) -> TypeGuard[type[BaseModel]]:
    return isinstance(annotation, type) and issubclass(annotation, BaseModel)

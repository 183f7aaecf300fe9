"""What is wrong with a config, in words for whoever wrote it."""

from __future__ import annotations

import difflib
import re
import typing
from collections.abc import Iterable, Iterator, Mapping, Sequence
from datetime import date
from typing import Any

from pydantic import BaseModel
from pydantic_core import ErrorDetails

from data_pipelines.config import MOVED
from engine.config import RunConfig
from losses import METHODS

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


def explain(error: ErrorDetails, raw: Mapping[str, Any], whole: type[BaseModel] = RunConfig) -> str:
    """One mistake that pydantic has found in a config, or in another `whole`, in a line for whoever wrote it."""
    kind, context, value = error["type"], error.get("ctx", {}), error["input"]
    shown = repr(value) if len(repr(value)) <= 300 else f"{repr(value)[:300]}..."
    loc = [
        part for i, part in enumerate(error["loc"]) if not (i == 1 and error["loc"][0] == "method" and part in METHODS)
    ]
    key = ".".join(str(part) for part in loc)
    if kind == "extra_forbidden":
        word, model = str(loc[-1]), _section_at(loc[:-1], raw, whole)
        if loc[:-1] == ["data"] and word in MOVED:
            return f"{key} = {shown}: moved; write data.{'.'.join(MOVED[word])}"
        section = ".".join(str(part) for part in loc[:-1]) or ("a config" if whole is RunConfig else "a sweep")
        near = _nearest_key(word, model) if whole is RunConfig else nearest(word, model.model_fields)
        return f"{key} = {shown}: unknown key{near}; {section} has: {', '.join(sorted(model.model_fields))}"
    if kind == "missing":
        field = _section_at(loc[:-1], raw, whole).model_fields.get(str(loc[-1]))
        told = (field and field.description) or "a value"
        return f"{key}: missing; expected {told[0].lower()}{told[1:].removesuffix('.')}"
    if kind in ("union_tag_not_found", "union_tag_invalid"):
        name = value.get("name") if isinstance(value, dict) else value
        return f"{key}.name = {name!r}: expected one of {', '.join(METHODS)}{nearest(str(name), list(METHODS))}"
    if kind == "literal_error":
        valid = re.findall(r"'([^']*)'", str(context["expected"]))
        return f"{key} = {shown}: expected one of {', '.join(valid)}{nearest(str(value), valid)}"
    if kind == "value_error":
        return f"{key}.{context['error']}" if key else str(context["error"])
    if kind == "string_pattern_mismatch":
        return f"{key} = {shown}: expected letters, digits, '.', '_' and '-', starting with a letter or digit"
    if kind == "too_short":
        return f"{key} = {shown}: expected at least {context['min_length']} item{'s' * (context['min_length'] > 1)}"
    if kind in ("greater_than", "greater_than_equal", "less_than", "less_than_equal"):
        return f"{key} = {shown}: expected a value {error['msg'].removeprefix('Input should be ')}"
    if kind == "string_type" and isinstance(value, int | float | date):
        return f"{key} = {shown}: expected text; in a file, write it in quotes"
    expected = _EXPECTED.get(kind) or error["msg"].removeprefix("Input should be ").removeprefix("Value should be ")
    return f"{key} = {shown}: expected {expected}"


ELSEWHERE = {
    "batch_size": "data.global_batch",
    "batch": "data.global_batch",
    "learning_rate": "optimizer.lr",
    "wd": "optimizer.weight_decay",
    "num_epochs": "train.epochs",
    "max_epochs": "train.epochs",
    "steps": "train.max_steps",
    "num_steps": "train.max_steps",
    "max_train_steps": "train.max_steps",
    "eval_steps": "evaluation.every_steps",
    "ema": "train.ema_decay",
    "grad_clip": "train.clip_norm",
    "workers": "data.decoding.threads",
    "num_workers": "data.decoding.threads",
    "amp": "precision.amp",
    "bf16": "precision.amp",
    "arch": "peers.N.network",
    "model": "peers.N.network",
    "output_dir": "dir",
    "save_dir": "dir",
}
"""What other trainers call our keys."""


def _nearest_key(word: str, model: type[BaseModel]) -> str:
    """A hint for a key that a section does not have: what others call ours, a namesake elsewhere, or one like it."""
    namesakes = [path for path in _paths(RunConfig) if path.rpartition(".")[2] == word and "." in path]
    namesakes = [path for path in namesakes if not path.startswith("peers.")] or namesakes
    known = ELSEWHERE.get(word) or (namesakes[0] if len(namesakes) == 1 else None)
    if known:
        return f"; did you mean {known!r}?"
    return nearest(word, model.model_fields if model is RunConfig else _paths(model))


def nearest(word: str, choices: Iterable[str]) -> str:
    """A hint; a choice is compared by its last part, and one that comes earlier goes before others of the same."""
    by_name = {choice.rpartition(".")[2]: choice for choice in reversed(list(choices))}
    near = difflib.get_close_matches(word, by_name, n=1, cutoff=0.5)
    return f"; did you mean {by_name[near[0]]!r}?" if near else ""


def _section_at(loc: Sequence[int | str], raw: Mapping[str, Any], whole: type[BaseModel]) -> type[BaseModel]:
    """What says which keys are valid at `loc`."""
    if list(loc[:1]) == ["method"]:
        return METHODS[raw["method"]["name"]].Options
    model = whole
    for part in loc:
        if isinstance(part, str):
            inner = section_of(model.model_fields[part].annotation)
            assert inner is not None
            model = inner
    return model


def _paths(model: type[BaseModel]) -> Iterator[str]:
    """The keys of a section, and those of the sections in it."""
    yield from model.model_fields
    for name, field in model.model_fields.items():
        inner = section_of(field.annotation)
        yield from () if inner is None else (f"{name}.{path}" for path in _paths(inner))


def section_of(annotation: Any) -> type[BaseModel] | None:
    """The section that a key of this type holds, alone or in a list."""
    found = (t for t in (annotation, *typing.get_args(annotation)) if isinstance(t, type) and issubclass(t, BaseModel))
    return next(found, None)

"""What sections of a run's `data:` are made of."""

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Strict
from pydantic_core import PydanticCustomError

_NAME = 255
"""Bytes of the longest name, on all file systems that Linux is used with."""

_WHOLE = 4095
"""Bytes of the longest path that Linux takes."""


def _usable(path: Path) -> Path:
    try:
        path.expanduser()
    except RuntimeError:
        raise PydanticCustomError("path", "a path; no user has the home {home}", {"home": path.parts[0]}) from None
    sizes = [len(os.fsencode(part)) for part in path.parts]
    if max(sizes, default=0) > _NAME:
        limits = {"most": _NAME, "found": max(sizes)}
        raise PydanticCustomError("path", "names of at most {most} bytes in a path, found one of {found}", limits)
    whole = len(os.fsencode(path))
    if whole > _WHOLE:
        limits = {"most": _WHOLE, "found": whole}
        raise PydanticCustomError("path", "a path of at most {most} bytes, found {found}", limits)
    return path


# YAML has no paths: this one is read from a string, all else must have its own type.
AnyPath = Annotated[Path, Strict(False), AfterValidator(_usable)]
"""A path as somebody writes it, with ~ for a home; it need not be there."""


def _on_or_off(value: object) -> object:
    return ("on" if value else "off") if isinstance(value, bool) else value


ON_OFF = BeforeValidator(_on_or_off)
"""For keys whose values are on, off and others: YAML takes the two words for true and false."""


class Section(BaseModel):
    """A section of a config: its keys and no others, of their own types."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, allow_inf_nan=False)


@dataclass(frozen=True)
class Only:
    """Beside a key's type: the key means something only where another one, `key`, has one of these values."""

    key: str
    values: tuple[str, ...]
    owner: str  # what an error calls these values

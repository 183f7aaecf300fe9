"""What sections of a run's `data:` are made of."""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

from pydantic import BaseModel, ConfigDict, Strict

# YAML has no paths: this one is read from a string, all else must have its own type.
AnyPath = Annotated[Path, Strict(False)]


class Section(BaseModel):
    """A section of a config: its keys and no others, of their own types."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, allow_inf_nan=False)


@dataclass(frozen=True)
class Only:
    """Beside a key's type: the key means something only where another one, `key`, has one of these values."""

    key: str
    values: tuple[str, ...]
    owner: str  # what an error calls these values

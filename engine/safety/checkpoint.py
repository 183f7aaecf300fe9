"""What a checkpoint is: a folder a step, written aside, synced and renamed, with the size and SHA-256 of every file.

    checkpoints/step_00001200/
        peer_NAME.pt    network, head, optimiser, moving average of one peer; of a frozen one the path of its weights
                        and their SHA-256
        shared.pt       what all peers share: the method's modules and buffers, a trunk, and their optimiser
        tables_*.pt     rows of the method's tables, if it has some, in parts
        manifest.json   step, files, the small state of the run and its own SHA-256; written last

A peer's file does not depend on where the peer lived, and each rank takes its rows out of whatever parts a table was
saved in, so a run goes on on any number of ranks. Random numbers are functions of the step, so there is nothing of them
to save.
"""

from __future__ import annotations

import hashlib
import json
import re
import shutil
import uuid
from collections.abc import Mapping
from dataclasses import asdict, field
from pathlib import Path
from typing import Annotated, Any, NoReturn

from pydantic import ConfigDict, Field, TypeAdapter, ValidationError
from pydantic.dataclasses import dataclass

from engine.cohort.peer import Resident
from engine.files import read_text, write_json
from models.stages import plain_state

VERSION = 3

EARLIER = (2,)
"""Versions that are read as well: without the run's config, its data and the steps of an epoch."""

_STRICT = ConfigDict(strict=True, extra="forbid", allow_inf_nan=False)
_Count = Annotated[int, Field(ge=0, lt=2**63)]


class CheckpointError(ValueError):
    """A checkpoint that cannot be used. The message names the file and what is wrong with it."""


@dataclass(frozen=True, config=_STRICT)
class Best:
    """The best evaluation so far: the mean top-1 of the peers."""

    step: _Count
    top1: float


@dataclass(frozen=True, config=_STRICT)
class FileEntry:
    """What a file of a checkpoint was when it was written."""

    size: _Count
    sha256: Annotated[str, Field(pattern="^[0-9a-f]{64}$")]


@dataclass(frozen=True, config=_STRICT)
class Standing:
    """Where a run stands, beside its weights."""

    step: _Count
    best: Best | None
    in_a_row: _Count
    """Updates skipped in a row up to now."""
    recent: dict[str, list[float]]
    """Losses of the last steps, of each peer, see `engine.safety.health`."""
    rollbacks: _Count
    """How often the run has gone back, see `engine.safety.rollback`."""
    steps_per_epoch: _Count = 0
    """0 where it is not known."""
    data: dict[str, str] = field(default_factory=dict)
    """What the data set holds, see `data_pipelines.Pipeline.contents`; {} where it is not known."""


@dataclass(frozen=True, config=_STRICT, kw_only=True)
class Manifest(Standing):
    """What a checkpoint says of itself."""

    method: str
    peers: list[Annotated[str, Field(pattern="^[A-Za-z0-9_.-]+$")]]
    num_classes: Annotated[int, Field(ge=1, lt=2**31)]
    channels: Annotated[int, Field(ge=1, lt=2**31)]
    scaler: dict[str, float | int]
    files: dict[str, FileEntry]
    config: dict[str, Any] = field(default_factory=dict)
    """Of the run, as far as its numbers depend on it, see `engine.config.identity`; {} where it is not known."""


def folder_of(run: Path, step: int) -> Path:
    """Where the checkpoint of a step lies."""
    return run / "checkpoints" / f"step_{step:08d}"


def steps_on_disk(run: Path) -> list[int]:
    """The steps that have a checkpoint folder, ascending; whether it is whole is another question."""
    names = (path.name for path in (run / "checkpoints").glob("step_*"))
    steps = [int(match[1]) for name in names if (match := re.fullmatch(r"step_(0[0-9]{7}|[1-9][0-9]{7,17})", name))]
    return sorted(steps)


def leftovers(run: Path) -> list[Path]:
    """What kills left behind in the middle of a write or a removal; and what is being written at the moment."""
    return sorted(path for kind in ("tmp", "removed") for path in (run / "checkpoints").glob(f"step_*.{kind}"))


def remove(folder: Path) -> None:
    """Removes a checkpoint, or what was left of one."""
    # Renamed first: a folder that is half removed would look like a damaged checkpoint.
    removed = folder.with_name(f"{folder.name}.{uuid.uuid4().hex[:8]}.removed")
    folder.rename(removed)
    shutil.rmtree(removed, ignore_errors=True)


def state_of(resident: Resident) -> dict[str, Any]:
    """What the file of a peer holds; of a frozen one, where its weights are."""
    peer = resident.peer
    if resident.optimizer is None:
        return {"reference": resident.reference and asdict(resident.reference)}
    return {
        "network": plain_state(resident.whole),
        "head": peer.head and peer.head.state_dict(),
        "optimizer": resident.optimizer.state_dict(),
        "outer": resident.outer_optimizer and resident.outer_optimizer.state_dict(),
        "ema": resident.ema and plain_state(resident.ema.module),
    }


def write_manifest(folder: Path, manifest: Manifest) -> None:
    """Writes it with its own SHA-256."""
    raw = {"version": VERSION, **asdict(manifest)}
    write_json(folder / "manifest.json", {**raw, "sha256": _signature(raw)})


def _signature(raw: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(raw, sort_keys=True).encode()).hexdigest()


def read_manifest(folder: Path) -> Manifest:
    """The manifest of a checkpoint whose files are all there, in their sizes.

    Raises:
        CheckpointError: naming what is missing, cut short or altered.
    """
    path = folder / "manifest.json"
    manifest = _parse_manifest(path)
    if folder.name != folder_of(folder, manifest.step).name:
        raise CheckpointError(f"{path}: of step {manifest.step}, which is not that of its folder")
    for name in ["shared.pt", *(f"peer_{name}.pt" for name in manifest.peers)]:
        if name not in manifest.files:
            raise CheckpointError(f"{path}: does not name {name}")
    for name, entry in manifest.files.items():
        file = folder / name
        if Path(name).name != name or "\0" in name or not _lies_in(folder, file):
            raise CheckpointError(f"{path}: names a file outside the checkpoint: {name!r}")
        if not file.is_file():
            raise CheckpointError(f"{file}: {'not a file' if file.exists() else 'missing'}")
        size = file.stat().st_size
        if size != entry.size:
            raise CheckpointError(f"{file}: cut short or altered: {entry.size} bytes expected, {size} found")
    return manifest


def _lies_in(folder: Path, file: Path) -> bool:
    try:
        return file.resolve().is_relative_to(folder.resolve())
    except (OSError, RuntimeError):  # RuntimeError: links in a circle.
        return False


def _parse_manifest(path: Path) -> Manifest:
    if not _lies_in(path.parent, path):
        raise CheckpointError(f"{path}: a link out of the checkpoint")
    if not path.is_file():
        reason = "not a file" if path.exists() else "missing; the checkpoint was not finished"
        raise CheckpointError(f"{path}: {reason}")
    try:
        raw = json.loads(read_text(path), object_pairs_hook=_each_key_once, parse_constant=_refuse_constant)
        version, signature = raw.pop("version"), raw.pop("sha256", None)
        if version != VERSION and version not in EARLIER:
            raise CheckpointError(f"{path}: version {version!r}; this program reads version {VERSION}")
        if signature != _signature({"version": version, **raw}):
            raise CheckpointError(f"{path}: altered: its SHA-256 is not the one that it names")
        if version == VERSION:
            raw["steps_per_epoch"], raw["data"], raw["config"]  # KeyError: only earlier ones go without.
        return TypeAdapter(Manifest).validate_json(json.dumps(raw))
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"])
        raise CheckpointError(f"{path}: not a manifest: {where}: {first['msg']}") from None
    except CheckpointError:
        raise
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise CheckpointError(f"{path}: not a manifest: {error}") from None


def _each_key_once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for key, value in pairs:
        if key in found:
            raise ValueError(f"key {key!r} stands twice")
        found[key] = value
    return found


def _refuse_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is no number")

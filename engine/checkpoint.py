"""Checkpoints: a folder a step, written aside, synced and renamed, with the size and SHA-256 of every file.

    checkpoints/step_00001200/
        peer_NAME.pt    network, head, optimiser, moving average of one peer
        shared.pt       what all peers share: the method's modules and buffers, a trunk, and their optimiser
        tables_*.pt     rows of the method's tables, if it has some, in parts
        manifest.json   step, files, and the small state of the run; written last

A peer's file does not depend on where the peer lived, and each rank takes its rows out of whatever parts a table was
saved in, so a run goes on on any number of ranks. Random numbers are functions of the step, so there is nothing of them
to save.
"""

from __future__ import annotations

import json
import pickle
import re
import shutil
import uuid
import warnings
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from engine.cohort import Cohort, Resident
from engine.files import digest, sync, write_json
from engine.tables import load_parts, parts
from models.stages import load_plain_state, plain_state

VERSION = 1


class CheckpointError(ValueError):
    """A checkpoint that cannot be used. The message names the file and what is wrong with it."""


@dataclass(frozen=True)
class Best:
    """The best evaluation so far: the mean top-1 of the peers."""

    step: int
    top1: float


@dataclass(frozen=True)
class Manifest:
    """What a checkpoint says of itself."""

    step: int
    method: str
    peers: list[str]
    num_classes: int
    channels: int
    best: Best | None
    in_a_row: int
    """Updates skipped in a row when it was written."""
    scaler: dict[str, Any]
    files: dict[str, dict[str, Any]]


def folder_of(run: Path, step: int) -> Path:
    """Where the checkpoint of a step lies."""
    return run / "checkpoints" / f"step_{step:08d}"


def steps_on_disk(run: Path) -> list[int]:
    """The steps that have a checkpoint folder, ascending; whether it is whole is another question."""
    names = (path.name for path in (run / "checkpoints").glob("step_*"))
    return sorted(int(match[1]) for name in names if (match := re.fullmatch(r"step_(\d+)", name)))


# -- writing ----------------------------------------------------------------------------------------------------------


def save(run: Path, cohort: Cohort, *, step: int, best: Best | None, in_a_row: int, keep: int) -> bool:
    """Writes the checkpoint of a step, from all ranks, and removes those that need not be kept.

    Returns:
        Whether it was written. Where it could not be, every rank warns and the ones before it stay as they are.
    """
    target = folder_of(run, step)
    aside = target.with_name(target.name + ".tmp")
    first = cohort.placement.rank == 0
    files: dict[str, dict[str, Any]] = {}
    failure = None
    if first:
        failure = _attempt(lambda: _empty(aside))
    dist.barrier()
    try:
        if cohort.placement.replica == 0:
            for resident in cohort.residents.values():
                _write(aside / f"peer_{resident.name}.pt", _state_of(resident), files)
        if first:
            shared = cohort.shared_optimizer
            state = {"modules": cohort.shared.state_dict(), "optimizer": shared and shared.state_dict()}
            _write(aside / "shared.pt", state, files)
        for name, rows in parts(cohort.shared).items():
            _write(aside / name, rows, files)
    except (OSError, RuntimeError) as error:  # RuntimeError is what torch makes of a full disk.
        failure = failure or str(error)
    reports: list[tuple[str | None, dict[str, dict[str, Any]]]] = [(None, {})] * cohort.placement.world
    dist.all_gather_object(reports, (failure, files))
    failures = [message for message, _ in reports if message]
    outcome = [failures[0] if failures else None]
    if first and not failures:
        manifest = Manifest(
            step=step,
            method=cohort.config.method.name,
            peers=[name for name, _ in cohort.config.cohort],
            num_classes=cohort.num_classes,
            channels=cohort.channels,
            best=best,
            in_a_row=in_a_row,
            scaler=cohort.scaler.state_dict(),
            files={name: entry for _, written in reports for name, entry in written.items()},
        )
        outcome = [_attempt(lambda: _complete(aside, target, manifest))]
    dist.broadcast_object_list(outcome, src=0)
    if outcome[0]:
        if first:
            shutil.rmtree(aside, ignore_errors=True)
            warnings.warn(f"checkpoint of step {step} not written: {outcome[0]}; training goes on", stacklevel=2)
        return False
    if first:
        _prune(run, keep, best)
    return True


def _attempt(action: Any) -> str | None:
    try:
        action()
    except OSError as error:
        return str(error)
    return None


def _empty(folder: Path) -> None:
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)


def _write(path: Path, state: dict[str, Any], files: dict[str, dict[str, Any]]) -> None:
    torch.save(state, path)
    sync(path)
    files[path.name] = digest(path)


def _complete(aside: Path, target: Path, manifest: Manifest) -> None:
    write_json(aside / "manifest.json", {"version": VERSION, **asdict(manifest)})
    if target.exists():
        _remove(target)
    aside.rename(target)
    sync(target.parent)


def _prune(run: Path, keep: int, best: Best | None) -> None:
    for step in steps_on_disk(run)[:-keep]:
        if best is None or step != best.step:
            _remove(folder_of(run, step))
    for pattern in ("step_*.removed", "step_*.tmp"):  # What kills left behind; nothing is being written now.
        for left_over in (run / "checkpoints").glob(pattern):
            shutil.rmtree(left_over, ignore_errors=True)


def _remove(folder: Path) -> None:
    # Renamed first: a folder that is half removed would look like a damaged checkpoint.
    removed = folder.with_name(f"{folder.name}.{uuid.uuid4().hex[:8]}.removed")
    folder.rename(removed)
    shutil.rmtree(removed, ignore_errors=True)


def _state_of(resident: Resident) -> dict[str, Any]:
    peer = resident.peer
    return {
        "network": plain_state(resident.whole),
        "head": peer.head and peer.head.state_dict(),
        "optimizer": resident.optimizer.state_dict(),
        "outer": resident.outer_optimizer and resident.outer_optimizer.state_dict(),
        "ema": resident.ema and plain_state(resident.ema.module),
    }


# -- reading ----------------------------------------------------------------------------------------------------------


def verify(folder: Path) -> Manifest:
    """Checks every file of a checkpoint against its manifest.

    Raises:
        CheckpointError: naming what is missing, cut short or altered.
    """
    path = folder / "manifest.json"
    try:
        raw = json.loads(path.read_text(encoding="utf-8"))
        version = raw.pop("version")
        if version != VERSION:
            raise CheckpointError(f"{path}: version {version!r}; this program reads version {VERSION}")
        best = raw.pop("best")
        manifest = Manifest(**raw, best=best and Best(**best))
        wanted = ["shared.pt", *(f"peer_{name}.pt" for name in manifest.peers)]
        files = {name: (entry["size"], entry["sha256"]) for name, entry in manifest.files.items()}
    except FileNotFoundError:
        raise CheckpointError(f"{path}: missing; the checkpoint was not finished") from None
    except (OSError, UnicodeDecodeError, json.JSONDecodeError, KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(f"{path}: not a manifest: {error}") from None
    for name in wanted:
        if name not in files:
            raise CheckpointError(f"{path}: does not name {name}")
    for name, (bytes_expected, sha256) in files.items():
        file = folder / name
        if Path(name).name != name:
            raise CheckpointError(f"{path}: names a file outside the checkpoint: {name!r}")
        if not file.is_file():
            raise CheckpointError(f"{file}: missing")
        size = file.stat().st_size
        if size != bytes_expected:
            raise CheckpointError(f"{file}: cut short or altered: {bytes_expected} bytes expected, {size} found")
        if digest(file)["sha256"] != sha256:
            raise CheckpointError(f"{file}: altered: its SHA-256 is not the one in the manifest")
    return manifest


def newest(run: Path) -> tuple[Manifest | None, list[str]]:
    """The newest checkpoint that is whole, if there is one, and what is wrong with those that are newer."""
    damaged: list[str] = []
    for step in reversed(steps_on_disk(run)):
        try:
            return verify(folder_of(run, step)), damaged
        except CheckpointError as error:
            damaged.append(str(error))
    return None, damaged


def read_state(folder: Path, name: str) -> dict[str, Any]:
    """One file of a checkpoint, on the CPU, without executing anything that may stand in it.

    Raises:
        CheckpointError: it holds something else than tensors and plain values.
    """
    try:
        return torch.load(folder / name, map_location="cpu", weights_only=True)
    except (pickle.UnpicklingError, RuntimeError, EOFError) as error:
        reason = str(error).partition("\n")[0]
        raise CheckpointError(
            f"{folder / name}: refused, as it is no file of tensors and nothing in it is executed: {reason}"
        ) from None


def load(run: Path, manifest: Manifest, cohort: Cohort) -> None:
    """Puts this rank's part of a checkpoint into the cohort.

    Raises:
        CheckpointError: the checkpoint is of other peers or of another method.
    """
    folder = folder_of(run, manifest.step)
    names = [name for name, _ in cohort.config.cohort]
    if manifest.peers != names:
        raise CheckpointError(f"{folder}: of the peers {', '.join(manifest.peers)}; expected {', '.join(names)}")
    if manifest.method != cohort.config.method.name:
        raise CheckpointError(f"{folder}: of method {manifest.method}; expected {cohort.config.method.name}")
    for resident in cohort.residents.values():
        state = read_state(folder, f"peer_{resident.name}.pt")
        load_plain_state(resident.whole, state["network"])
        if resident.peer.head is not None:
            resident.peer.head.load_state_dict(state["head"])
        resident.optimizer.load_state_dict(state["optimizer"])
        if resident.outer_optimizer is not None:
            resident.outer_optimizer.load_state_dict(state["outer"])
        if resident.ema is not None:
            load_plain_state(resident.ema.module, state["ema"])
    shared = read_state(folder, "shared.pt")
    cohort.shared.load_state_dict(shared["modules"])
    if cohort.shared_optimizer is not None:
        cohort.shared_optimizer.load_state_dict(shared["optimizer"])
    for name in load_parts(cohort.shared, manifest.files, partial(read_state, folder)):
        raise CheckpointError(f"{folder}: does not hold all rows of the table {name}")
    cohort.scaler.load_state_dict(manifest.scaler)

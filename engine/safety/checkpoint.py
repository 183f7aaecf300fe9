"""Checkpoints: a folder a step, written aside, synced and renamed, with the size and SHA-256 of every file.

    checkpoints/step_00001200/
        peer_NAME.pt    network, head, optimiser, moving average of one peer
        shared.pt       what all peers share: the method's modules and buffers, a trunk, and their optimiser
        tables_*.pt     rows of the method's tables, if it has some, in parts
        manifest.json   step, files, the small state of the run and its own SHA-256; written last

A peer's file does not depend on where the peer lived, and each rank takes its rows out of whatever parts a table was
saved in, so a run goes on on any number of ranks. Random numbers are functions of the step, so there is nothing of them
to save.
"""

from __future__ import annotations

import contextlib
import copy
import hashlib
import io
import json
import re
import shutil
import time
import uuid
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from concurrent.futures import wait as wait_for
from dataclasses import asdict, replace
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import Annotated, Any, NoReturn

import torch
import torch.distributed as dist
from pydantic import ConfigDict, Field, TypeAdapter, ValidationError
from pydantic.dataclasses import dataclass
from torch import Tensor

from engine.cohort.cohort import Cohort
from engine.cohort.peer import Resident
from engine.files import digest, sync, write_json
from engine.ranks.tables import ShardedTable, load_parts, parts
from models.stages import load_plain_state, plain_state

VERSION = 2

PATIENCE = 5.0
"""Seconds that training waits for a slow disk before it says so."""

WRITE_TIMEOUT = timedelta(minutes=30)
"""How long a rank that has written its files waits for one that has not; after the first step `train.timeout`, or the
ranks that are left could not end where one hangs in the middle of a save."""

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


@dataclass(frozen=True, config=_STRICT)
class Manifest(Standing):
    """What a checkpoint says of itself."""

    method: str
    peers: list[Annotated[str, Field(pattern="^[A-Za-z0-9_.-]+$")]]
    num_classes: Annotated[int, Field(ge=1, lt=2**31)]
    channels: Annotated[int, Field(ge=1, lt=2**31)]
    scaler: dict[str, float | int]
    files: dict[str, FileEntry]


def folder_of(run: Path, step: int) -> Path:
    """Where the checkpoint of a step lies."""
    return run / "checkpoints" / f"step_{step:08d}"


def steps_on_disk(run: Path) -> list[int]:
    """The steps that have a checkpoint folder, ascending; whether it is whole is another question."""
    names = (path.name for path in (run / "checkpoints").glob("step_*"))
    steps = [int(match[1]) for name in names if (match := re.fullmatch(r"step_(0[0-9]{7}|[1-9][0-9]{7,17})", name))]
    return sorted(steps)


# -- writing ----------------------------------------------------------------------------------------------------------


class Saver:
    """Saves a run beside its training: a save copies the state between two steps, and a thread writes the copy.

    Each peer is written by its first rank, what all share by rank 0, parts of tables by every rank. The threads of
    these ranks agree with each other over a process group that nobody else uses, so training may communicate at the
    same time.

    Args:
        run: the run's folder.
        cohort: what is saved.
        say: told what went wrong, on rank 0, from the thread that writes too.
    """

    def __init__(self, run: Path, cohort: Cohort, say: Callable[[str], None]) -> None:
        self._run, self._cohort, self._say = run, cohort, say
        placement = cohort.placement
        everyone = range(placement.world)
        in_parts = any(isinstance(module, ShardedTable) for module in cohort.shared.modules())
        writers = [rank for rank in everyone if in_parts or replace(placement, rank=rank).replica == 0]
        self._first, self._writes = placement.rank == 0, placement.rank in writers
        self.group: Any = dist.new_group(writers, timeout=WRITE_TIMEOUT, backend="gloo")
        """Of the ranks that write; nobody else may communicate in it."""
        self._thread = ThreadPoolExecutor(1, "checkpoint")
        self._pending: tuple[int, float, Future[bool]] | None = None
        self._written = True

    def save(self, standing: Standing, keep: int, hindrance: str | None = None) -> None:
        """Copies the state of this moment and has it written as the checkpoint of its step; then the oldest are
        removed, down to `keep` and the best. All ranks call this. Waits first while the one before is still being
        written.

        Where it cannot be written, what there is of it is removed, the ones before stay, and rank 0 says why.

        Args:
            hindrance: on rank 0, why there must be no checkpoint of this step.

        Raises:
            RuntimeError: a rank died while the one before was written.
        """
        if not self._writes:
            return
        self.wait()
        states: dict[str, Any] = {**parts(self._cohort.shared)}
        if self._cohort.placement.replica == 0:
            states |= {f"peer_{resident.name}.pt": _state_of(resident) for resident in self._cohort.residents.values()}
        manifest = None
        if self._first:
            cohort, shared = self._cohort, self._cohort.shared_optimizer
            states["shared.pt"] = {
                "modules": cohort.shared.state_dict(),
                "optimizer": shared and shared.state_dict(),
            }
            manifest = Manifest(
                **vars(standing),
                method=cohort.config.method.name,
                peers=[name for name, _ in cohort.config.trained],
                num_classes=cohort.num_classes,
                channels=cohort.channels,
                scaler=cohort.scaler.state_dict(),
                files={},
            )
        target = folder_of(self._run, standing.step)
        writing = self._thread.submit(self._write, target, _copied(states), manifest, keep, hindrance)
        self._pending = (standing.step, time.monotonic(), writing)

    def wait(self) -> bool:
        """Returns when what was saved is on disk, or has been told not to be; at once on a rank that writes nothing.
        All ranks call this, before the run ends and before checkpoints are read.

        Returns:
            On rank 0 whether the last checkpoint was written; True elsewhere.

        Raises:
            RuntimeError: a rank died while it was written.
        """
        if self._pending is None:
            return self._written
        step, since, writing = self._pending
        self._pending = None
        if wait_for([writing], PATIENCE).not_done:
            self._say(
                f"training waits for the checkpoint of step {step}, which has been written to {self._run} for "
                f"{time.monotonic() - since:.0f} s; if the disk is always that slow, save less often "
                "(checkpoint.every_steps, checkpoint.every_epochs)"
            )
        self._written = writing.result()
        return self._written

    @property
    def writing(self) -> bool:
        """Whether this rank is writing at the moment."""
        return self._pending is not None and not self._pending[2].done()

    def close(self) -> None:
        """Lets what is being written come to its end, whatever that is."""
        self._thread.shutdown()

    def _write(
        self, target: Path, states: dict[str, Any], manifest: Manifest | None, keep: int, failure: str | None
    ) -> bool:
        aside = target.with_name(target.name + ".tmp")
        files: dict[str, FileEntry] = {}
        outcome: str | None = None
        if manifest and not failure:
            failure = _attempt(partial(_empty, aside))
        dist.barrier(self.group)
        for name, state in states.items():
            failure = failure or _attempt(partial(_write, aside / name, state, files))
        reports: list[Any] = [None] * self.group.size()
        dist.all_gather_object(reports, (failure, files), self.group)
        if manifest:
            failures = [message for message, _ in reports if message]
            written = {name: entry for _, entries in reports for name, entry in entries.items()}
            complete = partial(_complete, aside, target, replace(manifest, files=written))
            outcome = failures[0] if failures else _attempt(complete)
            if outcome:
                shutil.rmtree(aside, ignore_errors=True)
                self._say(f"checkpoint of step {manifest.step} not written: {outcome}; training goes on")
            elif hindrance := _attempt(partial(_prune, self._run, keep, manifest)):
                self._say(f"old checkpoints not removed: {hindrance}; training goes on")
        dist.barrier(self.group)  # wait() returns on no rank before the checkpoint is there.
        return not outcome


def _attempt(action: Callable[[], object]) -> str | None:
    try:
        action()
    except OSError as error:
        return f"{error.filename}: {error.strerror}" if error.filename else str(error)
    return None


@torch.no_grad()
def _copied(states: dict[str, Any]) -> dict[str, Any]:
    """A copy in the host's memory, pinned where it comes from a GPU: one wait for all copies."""
    copies: dict[int, Any] = {}
    for tensor in _tensors(states):
        host = torch.empty_like(tensor, device="cpu", pin_memory=tensor.is_cuda)
        copies[id(tensor)] = host.copy_(tensor, non_blocking=True)
    if torch.cuda.is_initialized():
        torch.cuda.current_stream().synchronize()
    return copy.deepcopy(states, copies)


def _tensors(value: Any) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, dict | list | tuple):
        for inner in value.values() if isinstance(value, dict) else value:
            yield from _tensors(inner)


def _empty(folder: Path) -> None:
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)


class _Hashed(io.FileIO):
    """A file that hashes what goes through it, and keeps what the disk answered, which torch.save does not tell."""

    def __init__(self, path: Path) -> None:
        super().__init__(path, "w")
        self.size, self.sha256 = 0, hashlib.sha256()
        self.refusal: OSError | None = None

    def write(self, block: Any) -> int:
        rest = memoryview(block).cast("B")
        size = len(rest)
        self.sha256.update(rest)
        self.size += size
        try:
            while rest:  # A disk that fills up takes a part.
                rest = rest[super().write(rest) :]
        except OSError as error:
            self.refusal = error
            raise
        return size


def _write(path: Path, state: dict[str, Any], files: dict[str, FileEntry]) -> None:
    """Raises: OSError, with the path and what the disk answered."""
    file = _Hashed(path)
    try:
        with file:
            torch.save(state, file)
        sync(path)
    except (OSError, RuntimeError) as error:
        refusal = file.refusal or error
        raise OSError(f"{path}: {getattr(refusal, 'strerror', None) or refusal}") from None
    files[path.name] = FileEntry(file.size, file.sha256.hexdigest())


def _complete(aside: Path, target: Path, manifest: Manifest) -> None:
    write_manifest(aside, manifest)
    if target.exists():
        remove(target)
    aside.rename(target)
    sync(target.parent)


def write_manifest(folder: Path, manifest: Manifest) -> None:
    """Writes it with its own SHA-256."""
    raw = {"version": VERSION, **asdict(manifest)}
    write_json(folder / "manifest.json", {**raw, "sha256": _signature(raw)})


def _signature(raw: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(raw, sort_keys=True).encode()).hexdigest()


def _prune(run: Path, keep: int, newest: Manifest) -> None:
    # Those of later steps are damaged, or the run would have gone on from them: they must push out none that is whole.
    for step in [step for step in steps_on_disk(run) if step <= newest.step][:-keep]:
        if newest.best is None or step != newest.best.step:
            remove(folder_of(run, step))
    for left_over in leftovers(run):  # Nothing is being written now.
        shutil.rmtree(left_over, ignore_errors=True)


def leftovers(run: Path) -> list[Path]:
    """What kills left behind in the middle of a write or a removal; and what is being written at the moment."""
    return sorted(path for kind in ("tmp", "removed") for path in (run / "checkpoints").glob(f"step_*.{kind}"))


def remove(folder: Path) -> None:
    """Removes a checkpoint, or what was left of one."""
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


def verify(folder: Path) -> Manifest:
    """As `read_manifest`, and compares the SHA-256 of every file."""
    manifest = read_manifest(folder)
    for name, entry in manifest.files.items():
        try:
            found = digest(folder / name)["sha256"]
        except OSError as error:
            raise CheckpointError(f"{folder / name}: cannot be read: {error.strerror}") from None
        if found != entry.sha256:
            raise CheckpointError(f"{folder / name}: altered: its SHA-256 is not the one in the manifest")
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
        raw = json.loads(
            path.read_text(encoding="utf-8"), object_pairs_hook=_each_key_once, parse_constant=_refuse_constant
        )
        version, signature = raw.pop("version"), raw.pop("sha256", None)
        if version != VERSION:
            raise CheckpointError(f"{path}: version {version!r}; this program reads version {VERSION}")
        if signature != _signature({"version": version, **raw}):
            raise CheckpointError(f"{path}: altered: its SHA-256 is not the one that it names")
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
        state = torch.load(folder / name, map_location="cpu", weights_only=True)
    except Exception as error:  # What a file that somebody else made may raise has no end.
        reason = str(error).partition("\n")[0]
        raise CheckpointError(
            f"{folder / name}: refused, as it is no file of tensors and nothing in it is executed: {reason}"
        ) from None
    if not isinstance(state, dict):
        raise CheckpointError(f"{folder / name}: does not fit this run: expected a dict, found {type(state).__name__}")
    return state


def load(run: Path, manifest: Manifest, cohort: Cohort) -> None:
    """Puts a checkpoint into the cohort, each rank its part. All ranks call this.

    Raises:
        CheckpointError: on all ranks, where the checkpoint is of other peers or of another method, or one of them
            cannot use its part.
    """
    failure = None
    try:
        _load(folder_of(run, manifest.step), manifest, cohort)
    except (CheckpointError, OSError) as error:
        failure = str(error)
    failures: list[str | None] = [None] * cohort.placement.world
    dist.all_gather_object(failures, failure)
    for message in filter(None, failures):
        raise CheckpointError(message)


def _load(folder: Path, manifest: Manifest, cohort: Cohort) -> None:
    names = [name for name, _ in cohort.config.trained]
    if manifest.peers != names:
        raise CheckpointError(f"{folder}: of the peers {', '.join(manifest.peers)}; expected {', '.join(names)}")
    if manifest.method != cohort.config.method.name:
        raise CheckpointError(f"{folder}: of method {manifest.method}; expected {cohort.config.method.name}")
    for resident in cohort.residents.values():
        with _restored(folder, f"peer_{resident.name}.pt", _state_of(resident)) as state:
            load_plain_state(resident.whole, state["network"])
            if resident.peer.head is not None:
                resident.peer.head.load_state_dict(state["head"])
            _load_optimizer(resident.optimizer, state["optimizer"])
            if resident.outer_optimizer is not None:
                _load_optimizer(resident.outer_optimizer, state["outer"])
            if resident.ema is not None:
                load_plain_state(resident.ema.module, state["ema"])
    expected = {"modules": cohort.shared.state_dict(), "optimizer": None}
    with _restored(folder, "shared.pt", expected) as shared:
        cohort.shared.load_state_dict(shared["modules"])
        if cohort.shared_optimizer is not None:
            _load_optimizer(cohort.shared_optimizer, shared["optimizer"])
    for name in load_parts(cohort.shared, manifest.files, partial(read_state, folder)):
        raise CheckpointError(f"{folder}: does not hold all rows of the table {name}")
    with _fits(folder / "manifest.json"):
        cohort.scaler.load_state_dict(manifest.scaler)


@contextlib.contextmanager
def _restored(folder: Path, name: str, expected: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
    """One file's state, which has the weights that are expected: their names, shapes and number formats."""
    state = read_state(folder, name)
    with _fits(folder / name):
        _require_keys(expected, state, "")
        for part, weights in expected.items():
            if weights is None or part in ("optimizer", "outer"):
                continue
            if not isinstance(state[part], dict):
                raise ValueError(f"{part}: expected weights, found {type(state[part]).__name__}")
            _require_keys(weights, state[part], f"{part}: ")
            for key, wanted in weights.items():
                if isinstance(wanted, Tensor) and _kind(state[part][key]) != _kind(wanted):
                    raise ValueError(f"{part}: {key}: expected {_kind(wanted)}, found {_kind(state[part][key])}")
        yield state


def _require_keys(wanted: Mapping[str, Any], found: Mapping[str, Any], where: str) -> None:
    if missing := sorted(wanted.keys() - found.keys()):
        raise ValueError(f"{where}lacks {_first(missing)}")
    if extra := sorted(map(str, found.keys() - wanted.keys())):
        raise ValueError(f"{where}has {_first(extra)}, unknown here")


def _first(names: list[str]) -> str:
    return repr(names[0]) + (f" and {len(names) - 1} more" if len(names) > 1 else "")


def _kind(value: Any) -> str:
    if not isinstance(value, Tensor):
        return type(value).__name__
    return f"{str(value.dtype).removeprefix('torch.')} {list(value.shape)}"


@contextlib.contextmanager
def _fits(file: Path) -> Iterator[None]:
    try:
        yield
    except (ValueError, RuntimeError, KeyError, IndexError, TypeError, AttributeError) as error:
        raise CheckpointError(f"{file}: does not fit this run: {str(error).partition(chr(10))[0]}") from None


def _load_optimizer(optimizer: torch.optim.Optimizer, state: dict[str, Any]) -> None:
    optimizer.load_state_dict(state)
    for parameter, kept in optimizer.state.items():
        for name in {"momentum_buffer", "exp_avg", "exp_avg_sq"} & kept.keys():
            if isinstance(kept[name], Tensor) and kept[name].shape != parameter.shape:
                # torch would only notice in the middle of a step.
                shapes = f"{list(kept[name].shape)} for a weight {list(parameter.shape)}"
                raise ValueError(f"optimizer: {name} {shapes}")

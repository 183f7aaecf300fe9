"""Reading checkpoints: the newest that is whole, and its state into a cohort. Nothing in a file is executed."""

from __future__ import annotations

import contextlib
import hashlib
import io
import socket
from collections import defaultdict
from collections.abc import Collection, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

import models
from engine.cohort.cohort import Cohort
from engine.cohort.frozen import Reference, reference
from engine.cohort.layout import placed
from engine.config import PeerConfig, RunConfig
from engine.files import digest, read_bytes
from engine.ranks.tables import load_parts
from engine.safety.checkpoint import (
    CheckpointError,
    FileEntry,
    Manifest,
    folder_of,
    read_manifest,
    state_of,
    steps_on_disk,
)
from models.errors import first_line
from models.stages import load_plain_state


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


def newest(run: Path) -> tuple[Manifest | None, list[str]]:
    """The newest checkpoint that is whole, if there is one, and what is wrong with those that are newer.

    Beside a run in training: one that is pruned while it is looked at is not damaged, and has a successor.
    """
    while True:
        damaged: list[str] = []
        steps = steps_on_disk(run)
        for step in reversed(steps):
            try:
                return verify(folder_of(run, step)), damaged
            except CheckpointError as error:
                if folder_of(run, step).exists():
                    damaged.append(str(error))
        if steps_on_disk(run) == steps:
            return None, damaged


def read_state(folder: Path, name: str, entry: FileEntry | None = None) -> dict[str, Any]:
    """One file of a checkpoint, on the CPU, without executing anything that may stand in it.

    Args:
        entry: what the manifest says of it, if that is to be compared: by each rank, of the bytes that it uses itself.

    Raises:
        CheckpointError: it holds something else than tensors and plain values, or is not the file that was written.
    """
    try:
        content = read_bytes(folder / name)
    except OSError as error:
        raise CheckpointError(f"{folder / name}: cannot be read: {error.strerror or error}") from None
    if entry is not None and hashlib.sha256(content).hexdigest() != entry.sha256:
        raise CheckpointError(f"{folder / name}: altered: its SHA-256 is not the one in the manifest")
    try:
        state = torch.load(io.BytesIO(content), map_location="cpu", weights_only=True)
    except Exception as error:  # What a file that somebody else made may raise has no end.
        raise CheckpointError(
            f"{folder / name}: refused, as it is no file of tensors and nothing in it is executed: {first_line(error)}"
        ) from None
    if not isinstance(state, dict):
        raise CheckpointError(f"{folder / name}: does not fit this run: expected a dict, found {type(state).__name__}")
    return state


def load_networks(
    run: Path, manifest: Manifest, config: RunConfig, residents: Collection[int], device: torch.device
) -> dict[str, dict[int, nn.Module]]:
    """The plain networks of some peers, and their moving averages or teachers where there are any: all that it takes to
    score them. All ranks call this.

    Args:
        residents: numbers of the peers that live here.
        device: where the networks shall be.

    Returns:
        `val` and `ema`, to the networks by their peer's number.

    Raises:
        CheckpointError: on all ranks, where the checkpoint is of other peers or of another method, or the file of a
            peer does not fit its network.
    """
    folder, found = folder_of(run, manifest.step), defaultdict[str, dict[int, nn.Module]](dict)
    last = config.precision.channels_last != "off"
    with _all_or_none():
        _check_cohort(folder, manifest, config)
        for index in residents:
            name, peer = config.cohort[index]
            file = f"peer_{name}.pt"
            state = read_state(folder, file, manifest.files[file])
            if not peer.learns:
                network = _frozen(folder / file, state, peer, manifest)
                for prefix in ("val", "ema") if config.train.ema_decay else ("val",):
                    found[prefix][index] = placed(network, device, last=last)
                continue
            for prefix, part in (("val", "network"), ("ema", "ema")):
                with _fits(folder / file):
                    if state[part] is None and part == "ema":
                        continue
                    network = models.create(peer.network, manifest.num_classes, manifest.channels, **peer.options)
                    network.load_state_dict(state[part])
                found[prefix][index] = placed(network, device, last=last)
    return dict(found)


def _frozen(file: Path, state: Mapping[str, Any], peer: PeerConfig, manifest: Manifest) -> nn.Module:
    """The network of a frozen peer, which a checkpoint but refers to. Raises: CheckpointError, as it is another."""
    with _fits(file):
        network = models.create(
            peer.network,
            manifest.num_classes,
            manifest.channels,
            pretrained=peer.pretrained,
            entire=True,
            **peer.options,
        )
        _check_reference(state["reference"], reference(peer, network))
    return network


def _check_reference(stored: Mapping[str, str], found: Reference | None) -> None:
    if found is not None and found.sha256 != stored["sha256"]:
        raise CheckpointError(
            f"{found.source}: not the weights that the run was started with, those of {stored['source']}: SHA-256 "
            f"{found.sha256[:12]}..., expected {stored['sha256'][:12]}...; bring those back (a run keeps no copy of a "
            "frozen peer's weights)"
        )


def load(run: Path, manifest: Manifest, cohort: Cohort) -> None:
    """Puts a checkpoint into the cohort, each rank its part. All ranks call this.

    Raises:
        CheckpointError: on all ranks, where the checkpoint is of other peers or of another method, or one of them
            cannot use its part.
    """
    with _all_or_none():
        _load(folder_of(run, manifest.step), manifest, cohort)


@contextlib.contextmanager
def _all_or_none() -> Iterator[None]:
    """What one rank cannot do, none does: all ranks call this. Raises: CheckpointError, on all of them."""
    failure = None
    try:
        yield
    except (CheckpointError, OSError) as error:
        failure = str(error)
        if dist.get_rank():
            failure = f"{failure} (rank {dist.get_rank()} on {socket.gethostname()})"
    failures: list[str | None] = [None] * dist.get_world_size()
    dist.all_gather_object(failures, failure)
    for message in filter(None, failures):
        raise CheckpointError(message)


def _check_cohort(folder: Path, manifest: Manifest, config: RunConfig) -> None:
    names = [name for name, _ in config.trained]
    if manifest.peers != names:
        raise CheckpointError(f"{folder}: of the peers {', '.join(manifest.peers)}; expected {', '.join(names)}")
    if manifest.method != config.method.name:
        raise CheckpointError(f"{folder}: of method {manifest.method}; expected {config.method.name}")


def _load(folder: Path, manifest: Manifest, cohort: Cohort) -> None:
    _check_cohort(folder, manifest, cohort.config)
    for resident in cohort.residents.values():
        with _restored(folder, f"peer_{resident.name}.pt", manifest, state_of(resident)) as state:
            if resident.optimizer is None:
                _check_reference(state["reference"], resident.reference)
                continue
            load_plain_state(resident.whole, state["network"])
            if resident.peer.head is not None:
                resident.peer.head.load_state_dict(state["head"])
            _load_optimizer(resident.optimizer, state["optimizer"])
            if resident.outer_optimizer is not None:
                _load_optimizer(resident.outer_optimizer, state["outer"])
            if resident.ema is not None:
                load_plain_state(resident.ema.module, state["ema"])
    expected = {"modules": cohort.shared.state_dict(), "optimizer": None}
    with _restored(folder, "shared.pt", manifest, expected) as shared:
        cohort.shared.load_state_dict(shared["modules"])
        if cohort.shared_optimizer is not None:
            _load_optimizer(cohort.shared_optimizer, shared["optimizer"])
    for name in load_parts(cohort.shared, manifest.files, lambda name: read_state(folder, name, manifest.files[name])):
        raise CheckpointError(f"{folder}: does not hold all rows of the table {name}")
    with _fits(folder / "manifest.json"):
        cohort.scaler.load_state_dict(manifest.scaler)


@contextlib.contextmanager
def _restored(folder: Path, name: str, manifest: Manifest, expected: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
    """One file's state, which has the weights that are expected: their names, shapes and number formats."""
    state = read_state(folder, name, manifest.files[name])
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
        for name, value in kept.items():
            if isinstance(value, Tensor) and value.shape == parameter.shape:
                # A fused kernel goes through memory, and `precision.channels_last` may have been another.
                kept[name] = torch.empty_like(parameter, dtype=value.dtype, device=value.device).copy_(value)

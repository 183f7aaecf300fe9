"""The exchange after a step between peers that are jobs of their own: a folder where each leaves what it shows, and
takes what the others have left. Nobody waits for anybody.

    MEETING/PEER.safetensors    what PEER has shown last; its header holds the step, the run's config and a SHA-256

Whoever may write to the folder can put anything there. A file is read as tensors and JSON, from which nothing is
executed, and used only if it is whole, of a peer of this run, of the shapes and format of the method, finite, and if
what the peer would answer with it, for images at hand, is finite too and not absurd.
"""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import safetensors
import safetensors.torch
import torch
import torch.distributed as dist
from torch import Tensor

from engine.config import RunConfig
from engine.config.identity import differences, identity_of_cohort, read_identity
from engine.files import open_to_read, write_bytes
from engine.ranks.placement import Placement
from losses import Signals

LATE = 3
"""Exchanges in a row without anything new, after which a peer is called late. Peers at one pace meet in each."""

ABSURD = 1e6
"""The largest logit of a copy that one learns from. No network that has learnt something is so sure, and at such a
distance float32 no longer tells probabilities apart."""

_LONGEST_HEADER = 1 << 20
_DAMAGE = (OSError, ValueError, KeyError, TypeError, RecursionError, safetensors.SafetensorError)
_log = logging.getLogger(__name__)


def path_of(config: RunConfig, name: str) -> Path:
    """Where a peer leaves what it shows."""
    assert config.placement.meeting is not None
    return config.placement.meeting.expanduser() / f"{name}.safetensors"


def foreign(config: RunConfig, name: str) -> tuple[str, Any] | None:
    """A key of the config, and its value there, by which what lies in a peer's place is of another run; None where
    nothing of another run lies there."""
    try:
        with open_to_read(path_of(config, name)) as file:
            about, _ = _header(file)
        other = differences(read_identity(about["config"]), identity_of_cohort(config))
    except _DAMAGE:
        return None
    return next(((key, before) for key, (before, _) in other.items()), None)


@dataclass
class _Other:
    """What this job knows of another peer."""

    name: str
    path: Path
    shapes: Mapping[str, tuple[int, ...]]
    step: int | None = None
    """Of what was taken last, since this job has been started."""
    read: int | None = None
    """Of what was read last, whether or not it could be used, and"""
    sha256: str | None = None
    """which bits that were."""
    silent: int = 0
    """Exchanges in a row without anything new."""
    unusable: bool = False
    """Whether something was wrong with its file the last time, which has been said."""
    absurd: bool = False
    """The same of its answers."""

    def what_stays(self, step: int) -> str:
        """In words, at a step of this job."""
        if self.step is None:
            return "its last copy, if there is one, stays in use"
        return f"its copy of {_distance(self.step, step)}, stays in use"


class Meeting:
    """Takes the place of `Exchange` after a step. Rank 0 of the job writes and reads; all its ranks take the same bits.

    Args:
        config: of the run; `placement.meeting` is the folder, which need not be there yet.
        placement: of one peer.
        shapes: what the method says that peers show, `MeetsAsJobs.shapes_shown`.
        device: where the others' tensors come to lie.
    """

    def __init__(
        self,
        config: RunConfig,
        placement: Placement,
        shapes: Sequence[Mapping[str, tuple[int, ...]]],
        device: torch.device,
    ) -> None:
        names = [name for name, _ in config.cohort]
        self._peer, self._device = placement.peers[0], device
        self._first = placement.rank == 0
        self._name, self._path = names[self._peer], path_of(config, names[self._peer])
        self._config = identity_of_cohort(config)
        self.program: dict[str, str] = {}
        """What the other jobs must train with as well, see `engine.ranks.roll_call.program`."""
        self._num_peers, self._shapes = len(names), shapes
        self._others = {
            k: _Other(name, path_of(config, name), shapes[k]) for k, name in enumerate(names) if k != self._peer
        }

    def start_over(self) -> None:
        """Removes what an earlier run of this peer has left, so that nobody learns from it."""
        try:
            if self._first:
                self._path.unlink(missing_ok=True)
        except OSError as error:
            _log.warning("%s: not removed: %s", self._path, error)

    def __call__(
        self,
        own: Mapping[int, Signals],
        *,
        step: int,
        answers: Callable[[int, Signals], Tensor],
        wire: torch.dtype = torch.float32,
    ) -> Sequence[Signals]:
        """As `losses.capabilities.ExchangeAfterStep`; a peer of which nothing new has come is {}.

        Args:
            own: of this job's peer.
            step: how many have been done.
            answers: the logits that a peer, by its index and with what it shows, would give here.
            wire: number format of the files.
        """
        shown: list[Signals] = [own.get(k, {}) for k in range(self._num_peers)]
        if self._first:
            self._leave(own[self._peer], step, wire)
            for k, other in self._others.items():
                shown[k] = self._read(other, step, wire)
        new: list[Any] = [[k for k in self._others if shown[k]]]
        dist.broadcast_object_list(new, src=0)
        for k in new[0]:
            there = {name: self._on_all_ranks(shown[k].get(name), shape) for name, shape in self._shapes[k].items()}
            shown[k] = there if self._can_be_learnt_from(answers(k, there)) else {}
        for k, other in self._others.items():
            self._note(other, step, read=k in new[0], taken=bool(shown[k]))
        return shown

    def _on_all_ranks(self, tensor: Tensor | None, shape: tuple[int, ...]) -> Tensor:
        here = torch.empty(shape, device=self._device) if tensor is None else tensor.float().to(self._device)
        dist.broadcast(here, src=0)
        return here

    def _can_be_learnt_from(self, logits: Tensor) -> bool:
        """Whether no rank of this job has met anything else in a copy's answers."""
        unusable = ~(logits.abs().amax() <= ABSURD)  # Nothing is below that is no number.
        anywhere = unusable.float().reshape(1)
        dist.all_reduce(anywhere, dist.ReduceOp.MAX)
        return not anywhere.item()

    def _leave(self, own: Signals, step: int, wire: torch.dtype) -> None:
        tensors = {name: x.detach().to(wire).cpu().contiguous() for name, x in own.items()}
        about = {
            "peer": self._name,
            "step": str(step),
            "sha256": _sha256(tensors),
            "config": json.dumps(self._config),
            "program": json.dumps(self.program),
        }
        try:
            self._path.parent.mkdir(parents=True, exist_ok=True)
            write_bytes(self._path, safetensors.torch.save(tensors, about))
        except OSError as error:
            _log.warning("step %d: %s: not written: %s; training goes on", step, self._path, error)

    def _read(self, other: _Other, step: int, wire: torch.dtype) -> Signals:
        """What a peer has left since the last time; {} where there is nothing new that can be read."""
        tensors: Signals = {}
        unusable = False
        try:
            tensors = self._take(other, wire)
        except FileNotFoundError:
            pass
        except _DAMAGE as error:
            unusable = True
            if not other.unusable:
                why = getattr(error, "strerror", None) or str(error)[:300] or type(error).__name__
                _log.warning("step %d: %s: not used: %s; %s", step, other.path, why, other.what_stays(step))
        other.unusable = unusable
        return tensors

    def _note(self, other: _Other, step: int, *, read: bool, taken: bool) -> None:
        """Says who is late, back, or absurd: once, by rank 0."""
        if read and not taken and not other.absurd and self._first:
            _log.warning(
                "step %d: peer %s: not used: at step %d it gives answers that are not finite, or above %g, "
                "to images of this step; %s",
                *(step, other.name, other.read, ABSURD, other.what_stays(step)),
            )
        other.absurd = not taken and (read or other.absurd)
        late, other.silent = other.silent >= LATE, 0 if taken else other.silent + 1
        if taken:
            other.step = other.read
        if other.silent == LATE and self._first:
            stays = other.what_stays(step)
            _log.warning("step %d: peer %s: nothing new in %d exchanges; %s", step, other.name, LATE, stays)
        if taken and late and self._first:
            _log.warning("step %d: peer %s is back: %s", step, other.name, _distance(other.step or 0, step))

    def _take(self, other: _Other, wire: torch.dtype) -> Signals:
        """Reads and checks what lies in a peer's place, unless it is what was taken last. Raises: one of _DAMAGE."""
        largest = sum(torch.Size(shape).numel() for shape in other.shapes.values()) * wire.itemsize
        with open_to_read(other.path) as file:
            about, header = _header(file)
            if about["sha256"] == other.sha256:
                return {}
            data = file.read(largest + 1)
        if len(data) > largest:
            raise ValueError(f"larger than the {largest} bytes that are expected")
        tensors = safetensors.torch.load(header + data)
        if about["peer"] != other.name:
            raise ValueError(f"of peer {about['peer']!r}")
        for key, (before, now) in differences(read_identity(about["config"]), self._config).items():
            raise ValueError(f"of another run: {key} = {before!r} there, {now!r} here")
        program = json.loads(about.get("program", "{}"))
        for key in self.program.keys() & program.keys():
            if program[key] != self.program[key]:
                raise ValueError(f"{key}: {str(program[key])[:100]!r} there, {self.program[key]!r} here")
        found = {name: (*x.shape, str(x.dtype)) for name, x in tensors.items()}
        expected = {name: (*shape, str(wire)) for name, shape in other.shapes.items()}
        if found != expected:
            raise ValueError(f"holds {found}; expected {expected}")
        if _sha256(tensors) != about["sha256"]:
            raise ValueError("altered: its SHA-256 is not the one in its header")
        if not all(x.isfinite().all() for x in tensors.values()):
            raise ValueError("holds numbers that are not finite")
        other.read, other.sha256 = int(about["step"]), about["sha256"]
        return tensors


def _header(file: BinaryIO) -> tuple[dict[str, str], bytes]:
    """What the header of a safetensors file says, and its bytes.

    Read, not mapped: a mapped file that is replaced meanwhile ends the process on network file systems.

    Raises:
        one of _DAMAGE: it is no such file.
    """
    start = file.read(8)
    length = int.from_bytes(start, "little")
    if length > _LONGEST_HEADER:
        raise ValueError("not a safetensors file")
    text = file.read(length)
    return json.loads(text)["__metadata__"], start + text


def _sha256(tensors: Mapping[str, Tensor]) -> str:
    sha = hashlib.sha256()
    for name in sorted(tensors):
        sha.update(name.encode())
        sha.update(tensors[name].reshape(-1).view(torch.uint8).numpy().data)
    return sha.hexdigest()


def _distance(theirs: int, here: int) -> str:
    return f"step {theirs}, {abs(here - theirs)} steps {'behind' if theirs <= here else 'ahead'}"

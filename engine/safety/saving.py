"""Writing checkpoints, beside training: whole or not at all, and neither a full nor a slow disk ends a run."""

from __future__ import annotations

import copy
import hashlib
import io
import shutil
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from concurrent.futures import wait as wait_for
from dataclasses import replace
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from engine.cohort.cohort import Cohort
from engine.config.identity import identity
from engine.files import opener, sync
from engine.ranks.collectives import leave
from engine.ranks.tables import ShardedTable, parts
from engine.safety.checkpoint import (
    FileEntry,
    Manifest,
    Standing,
    folder_of,
    leftovers,
    remove,
    state_of,
    steps_on_disk,
    write_manifest,
)

PATIENCE = 5.0
"""Seconds that training waits for a slow disk before it says so."""

AGAIN = (1.0, 4.0, 10.0)
"""Seconds until a last checkpoint that could not be written is tried again, and again."""

WRITE_TIMEOUT = timedelta(minutes=30)
"""How long a rank that has written its files waits for one that has not; after the first step `train.timeout`, or the
ranks that are left could not end where one hangs in the middle of a save."""


class NotSavedError(RuntimeError):
    """A run has come to its end, and its last step is not on disk."""


class Saver:
    """Saves a run beside its training: a save copies the state between two steps, and a thread writes the copy.

    Each peer is written by its first rank, what all share by rank 0, parts of tables by every rank. The threads of
    these ranks agree with each other over a process group that nobody else uses, so training may communicate at the
    same time.

    Args:
        run: the run's folder.
        cohort: what is saved.
        say: told what went wrong, on rank 0, from the thread that writes too.
        check: raises an OSError, on rank 0, where the run's folder belongs to another run by now.
        mark: the same on all ranks and another for each start: what a run that has lost its folder still writes must
            not mix with what its successor writes.
    """

    def __init__(
        self,
        run: Path,
        cohort: Cohort,
        say: Callable[[str], None],
        check: Callable[[], None] = lambda: None,
        mark: str = "0",
    ) -> None:
        self._run, self._cohort, self._say, self._check, self._mark = run, cohort, say, check, mark
        placement = cohort.placement
        everyone = range(placement.world)
        in_parts = any(isinstance(module, ShardedTable) for module in cohort.shared.modules())
        writers = [*everyone] if in_parts else sorted(group.ranks[0] for group in placement.groups)
        self._first, self._writes = placement.rank == 0, placement.rank in writers
        self.group: Any = dist.new_group(writers, timeout=WRITE_TIMEOUT, backend="gloo")
        """Of the ranks that write; nobody else may communicate in it."""
        self._thread = ThreadPoolExecutor(1, "checkpoint")
        self._pending: tuple[int, float, Future[bool]] | None = None
        self._written = True

    def save(self, standing: Standing, keep: int, hindrance: str | None = None, *, last: bool = False) -> None:
        """Copies the state of this moment and has it written as the checkpoint of its step; then the oldest are
        removed, down to `keep` and the best. All ranks call this. Waits first while the one before is still being
        written.

        Where it cannot be written, what there is of it is removed, the ones before stay, and rank 0 says why.

        Args:
            hindrance: on rank 0, why there must be no checkpoint of this step.
            last: nothing is trained after it.

        Raises:
            RuntimeError: a rank died while the one before was written.
        """
        if not self._writes:
            return
        self.wait()
        states: dict[str, Any] = {**parts(self._cohort.shared)}
        if self._cohort.placement.replica == 0:
            states |= {f"peer_{resident.name}.pt": state_of(resident) for resident in self._cohort.residents.values()}
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
                config=identity(cohort.config),
                files={},
            )
        target = folder_of(self._run, standing.step)
        after = "nothing is trained after it" if last else "training goes on"
        writing = self._thread.submit(self._write, target, _copied(states), manifest, keep, hindrance, after)
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
        if self._writes:
            leave(self.group)

    def _write(
        self,
        target: Path,
        states: dict[str, Any],
        manifest: Manifest | None,
        keep: int,
        failure: str | None,
        after: str,
    ) -> bool:
        aside = target.with_name(f"{target.name}.{self._mark}.tmp")
        files: dict[str, FileEntry] = {}
        outcome: str | None = None
        if manifest and not failure:
            failure = _attempt(self._check) or _attempt(partial(_empty, aside))
        dist.barrier(self.group)
        for name, state in states.items():
            failure = failure or _attempt(partial(_write, aside / name, state, files))
        reports: list[Any] = [None] * self.group.size()
        dist.all_gather_object(reports, (failure, files), self.group)
        if manifest:
            failures = [message for message, _ in reports if message]
            written = {name: entry for _, entries in reports for name, entry in entries.items()}
            complete = partial(_complete, aside, target, replace(manifest, files=written))
            outcome = failures[0] if failures else _attempt(self._check) or _attempt(complete)
            if outcome:
                shutil.rmtree(aside, ignore_errors=True)
                self._say(f"checkpoint of step {manifest.step} not written: {outcome}; {after}")
            elif hindrance := _attempt(partial(_prune, self._run, keep, manifest)):
                self._say(f"old checkpoints not removed: {hindrance}; {after}")
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
        super().__init__(path, "w", opener=opener)
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


def _prune(run: Path, keep: int, newest: Manifest) -> None:
    # Those of later steps are damaged, or the run would have gone on from them: they must push out none that is whole.
    for step in [step for step in steps_on_disk(run) if step <= newest.step][:-keep]:
        if newest.best is None or step != newest.best.step:
            remove(folder_of(run, step))
    for left_over in leftovers(run):  # Nothing is being written now.
        shutil.rmtree(left_over, ignore_errors=True)

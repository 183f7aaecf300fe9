"""What launch/checkpoint.py does, once its words are read."""

from __future__ import annotations

import argparse
import contextlib
import time
from collections.abc import Iterator
from datetime import datetime
from pathlib import Path
from typing import Any

from torch import Tensor

from engine.config import ConfigError
from engine.reporting.tracking import read_metrics
from engine.safety import checkpoint, loading
from engine.safety.checkpoint import CheckpointError
from launch.entry import user_errors
from launch.run_folder import choose_step, use

BEING_WRITTEN = 3600.0
"""Seconds since its last change for which a folder that is not finished may still be being written."""


def run(options: argparse.Namespace) -> int:
    """Does what was asked for. Returns: the exit code."""
    with user_errors():
        if not checkpoint.steps_on_disk(options.run) and not checkpoint.leftovers(options.run):
            raise ConfigError(f"{options.run}: holds no checkpoints; expected the folder of a run that has saved some")
        return {"ls": ls, "verify": verify, "show": show, "prune": prune}[options.command](options)
    raise AssertionError


def ls(options: argparse.Namespace) -> int:
    """lists a run's checkpoints; whole means that all files have their sizes, verify looks closer"""
    run = options.run
    best, epochs = _best(run), {line["step"]: line["epoch"] for line in read_metrics(run) if "epoch" in line}
    row = "{:>9}  {:>7}  {:>9}  {:19}  {:>9}  {:4}  {}".format
    print(row("step", "epoch", "size", "written", "ago", "", "state"))
    for step in checkpoint.steps_on_disk(run):
        folder = checkpoint.folder_of(run, step)
        try:
            checkpoint.read_manifest(folder)
            state = "whole"
        except CheckpointError as error:
            state = f"damaged: {error}"
        changed = folder.stat().st_mtime
        epoch = f"{epochs[step]:g}" if step in epochs else "-"
        written = f"{datetime.fromtimestamp(changed):%Y-%m-%d %H:%M:%S}"
        mark = "best" if step == best else ""
        print(row(step, epoch, _bytes(_size(folder)), written, _span(time.time() - changed), mark, state))
    if best is not None and best not in checkpoint.steps_on_disk(run):
        print(f"the best was that of step {best}, which is not on disk")
    for folder in checkpoint.leftovers(run):
        print(f"not finished: {folder.name}, {_bytes(_size(folder))}")
    return 0


def verify(options: argparse.Namespace) -> int:
    """compares all files of checkpoints with their SHA-256; exit code 1 where one is damaged"""
    run, damaged = options.run, 0
    for step in _steps(run, options.checkpoint):
        try:
            manifest = loading.verify(checkpoint.folder_of(run, step))
            size = sum(entry.size for entry in manifest.files.values())
            print(f"step {step}: whole, {len(manifest.files)} files, {_bytes(size)}")
        except CheckpointError as error:
            damaged += 1
            print(f"step {step}: DAMAGED: {error}")
    return min(damaged, 1)


def show(options: argparse.Namespace) -> int:
    """prints what is in a checkpoint: its manifest, and the tensors of each file"""
    use(options.run, options.checkpoint, lambda manifest: _show(options.run, manifest))
    return 0


def _show(run: Path, manifest: checkpoint.Manifest) -> None:
    folder = checkpoint.folder_of(run, manifest.step)
    states = {name: loading.read_state(folder, name, entry) for name, entry in manifest.files.items()}
    best = manifest.best and f"step {manifest.best.step}, mean top-1 {manifest.best.top1:.2f} %"
    print(f"{folder}\n  method   {manifest.method}\n  peers    {', '.join(manifest.peers)}")
    print(f"  classes  {manifest.num_classes}\n  channels {manifest.channels}\n  best     {best or '-'}")
    print(f"  skipped  {manifest.in_a_row} updates in a row")
    for name, entry in manifest.files.items():
        print(f"\n{name}: {_bytes(entry.size)}, SHA-256 {entry.sha256}")
        for part, state in states[name].items():
            found = [] if state is None else list(_values("", state))
            numbers = sum(value.numel() for _, value in found if isinstance(value, Tensor))
            print(f"  {part}: {f'{numbers:,} numbers' if found else 'none'}")
            width = max((len(key) for key, _ in found), default=0)
            for key, value in found:
                if isinstance(value, Tensor):
                    dtype = str(value.dtype).removeprefix("torch.")
                    print(f"    {key:{width}}  {dtype:9} {list(value.shape)!s:20} {value.numel():,}")
                else:
                    print(f"    {key:{width}}  {value!r}")


def prune(options: argparse.Namespace) -> int:
    """removes all checkpoints but the newest whole ones and the best, and what kills left behind"""
    run, steps, whole = options.run, checkpoint.steps_on_disk(options.run), []
    for step in steps:
        try:
            whole.append(loading.verify(checkpoint.folder_of(run, step)).step)
        except CheckpointError as error:
            print(f"damaged: {error}")
    kept = {*whole[-options.keep :], *({_best(run)} & {*whole})}
    going = [checkpoint.folder_of(run, step) for step in steps if step not in kept]
    if not whole and going:
        print("none is whole, so none is removed")
        going = []
    for folder in checkpoint.leftovers(run):
        if time.time() - _last_change(folder) < BEING_WRITTEN:
            print(f"left alone, as it may be being written: {folder.name}")
        else:
            going.append(folder)
    for folder in going:
        print(f"{'would remove' if options.dry_run else 'removes'} {folder.name}, {_bytes(_size(folder))}")
        if not options.dry_run:
            checkpoint.remove(folder)
    return 0


def _steps(run: Path, which: str) -> list[int]:
    steps = checkpoint.steps_on_disk(run)
    return steps if which == "all" else [choose_step(run, which, max(steps, default=None), _best(run))]


def _best(run: Path) -> int | None:
    """The step of the best evaluation, by the newest manifest that can be read."""
    for step in reversed(checkpoint.steps_on_disk(run)):
        with contextlib.suppress(CheckpointError):
            best = checkpoint.read_manifest(checkpoint.folder_of(run, step)).best
            return best.step if best else None
    return None


def _values(key: str, value: Any) -> Iterator[tuple[str, Any]]:
    """The tensors and plain values in a state, each with its path; names that would steer a terminal are escaped."""
    if isinstance(value, dict):
        for name, inner in value.items():
            shown = str(name).encode("unicode_escape").decode()
            yield from _values(f"{key}.{shown}" if key else shown, inner)
    elif isinstance(value, list | tuple) and any(isinstance(inner, dict | list | tuple | Tensor) for inner in value):
        yield from _values(key, dict(enumerate(value)))
    else:
        yield key, value


def _last_change(folder: Path) -> float:
    return max(path.lstat().st_mtime for path in (folder, *folder.rglob("*")))


def _size(folder: Path) -> int:
    return sum(path.lstat().st_size for path in folder.rglob("*") if not path.is_dir())


def _bytes(size: float) -> str:
    for unit in ("B", "KB", "MB"):
        if size < 1000:
            return f"{size:.3g} {unit}"
        size /= 1000
    return f"{size:,.4g} GB"


def _span(seconds: float) -> str:
    for length, unit in ((86400, "d"), (3600, "h"), (60, "min")):
        if seconds >= length:
            return f"{seconds / length:.1f} {unit}"
    return f"{seconds:.0f} s"

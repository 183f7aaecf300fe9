"""Runs whose checkpoints are damaged or forged."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from engine.config import RunConfig
from engine.files import digest
from engine.safety.loading import read_state
from tests.runs import small_run

PEER = "peer_cifar_resnet8_b-1.pt"


def a_run(tiny: Path, folder: Path, **sections: Any) -> RunConfig:
    """2 epochs of 5 steps on one rank, with a checkpoint of steps 9 and 10 left at the end."""
    return small_run(tiny, folder, **{"checkpoint": {"every_steps": 3}, **sections})


def edit(path: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    """Changes a JSON file."""
    raw = json.loads(path.read_text())
    path.write_text(json.dumps(change(raw) or raw))


def forge(folder: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    """Changes a manifest and makes its SHA-256 fit."""

    def sign(raw: dict[str, Any]) -> dict[str, Any]:
        raw = change(raw) or raw
        raw.pop("sha256", None)
        return {**raw, "sha256": hashlib.sha256(json.dumps(raw, sort_keys=True).encode()).hexdigest()}

    edit(folder / "manifest.json", sign)


def replace_file(folder: Path, name: str, content: bytes) -> None:
    """Puts something else in the place of a file, and makes the manifest agree with it."""
    (folder / name).write_bytes(content)
    forge(folder, lambda raw: raw["files"].update({name: digest(folder / name)}))


def change_state(folder: Path, name: str, change: Callable[[dict[str, Any]], Any]) -> None:
    """Changes what a file of a checkpoint holds, and makes the manifest agree with it."""
    state = read_state(folder, name)
    state = change(state) or state
    torch.save(state, folder / name)
    forge(folder, lambda raw: raw["files"].update({name: digest(folder / name)}))

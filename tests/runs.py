"""Small runs for tests."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from engine.config import RunConfig
from engine.config.loading import validate
from engine.ranks.collectives import Launch
from engine.safety import checkpoint, loading
from engine.trainer import train


def small_run(
    tiny: Path,
    folder: Path,
    method: dict[str, Any] | None = None,
    peers: int | list[dict[str, Any]] = 2,
    **sections: Any,
) -> RunConfig:
    """A cohort of small CIFAR ResNets on 120 images: 5 steps of 24 an epoch, 2 epochs."""
    raw: dict[str, Any] = {
        "name": "small",
        "dir": str(folder),
        "method": method or {"name": "dml"},
        "peers": peers,
        "data": {"dataset": "fashion_mnist", "root": str(tiny), "global_batch": 24},
        "train": {"epochs": 2},
        "optimizer": {"lr": 0.05},
        "log": {"progress": False, "every_steps": 2},
    }
    if isinstance(peers, int):
        raw["peers"] = [{"network": "cifar_resnet8_b", "copies": peers, "options": {"width": 4}}]
    for name, section in sections.items():
        raw[name] = raw[name] | section if isinstance(raw.get(name), dict) and isinstance(section, dict) else section
    return validate(raw)


def train_here(config: RunConfig) -> None:
    """Trains on this rank of the world that the environment names."""
    train(config, Launch.from_environment())


def weights(folder: Path, step: int | None = None) -> dict[str, torch.Tensor]:
    """Every tensor of the network of every peer that learns in a checkpoint, the newest if no step is given, as
    `peer/name`."""
    where = checkpoint.folder_of(folder, step or checkpoint.steps_on_disk(folder)[-1])
    manifest = loading.verify(where)
    return {
        f"{peer}/{name}": tensor
        for peer in manifest.peers
        for name, tensor in loading.read_state(where, f"peer_{peer}.pt").get("network", {}).items()
    }


def assert_same_weights(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor], relative: float = 1e-5) -> None:
    """Promise 1's measure: each tensor within `relative` of the other in norm; 0 asks for equal bits."""
    assert one.keys() == other.keys()
    for name, expected in other.items():
        difference = (one[name].double() - expected.double()).norm()
        assert difference <= relative * expected.double().norm(), f"{name}: {difference / expected.double().norm():.2e}"

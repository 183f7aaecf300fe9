"""A network on disk by itself: weights as safetensors, and a small JSON that says how to build what they belong to."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import safetensors
import torch
from safetensors.torch import load_file, save
from torch import nn

from models.registry import LIBRARIES, create

FORMAT = "cohort-network"
VERSION = 1


class ExportError(ValueError):
    """An exported network that cannot be read; the message names the file and what is wrong with it."""


def save_network(network: nn.Module, path: Path, architecture: dict[str, Any], about: dict[str, Any]) -> None:
    """Writes `path` (.json) and, beside it, the weights (.safetensors); each appears whole or not at all.

    Args:
        network: as `create(**architecture)` builds it, with any weights, on any device.
        path: of the JSON.
        architecture: `name`, `num_classes`, `in_channels` and `options` of the network.
        about: whatever a reader wants to know of it, kept as it is.
    """
    weights = path.with_suffix(".safetensors")
    tensors = {name: tensor.detach().cpu().contiguous().clone() for name, tensor in network.state_dict().items()}
    card = {
        "format": FORMAT,
        "version": VERSION,
        "weights": weights.name,
        "architecture": architecture,
        "load": load_command(architecture, weights.name),
        **about,
    }
    aside, card_aside = (file.with_name(file.name + ".tmp") for file in (weights, path))
    # In one piece: what safetensors writes itself nobody but the owner may read.
    _write(aside, save(tensors, metadata={"format": "pt"}))
    _write(card_aside, (json.dumps(card, indent=2) + "\n").encode())
    aside.replace(weights)
    card_aside.replace(path)


def load_network(path: Path) -> nn.Module:
    """Builds an exported network with its weights, in evaluation mode, on the CPU.

    Raises:
        ExportError: a file is missing or is not what it should be, or the weights belong to another network.
    """
    try:
        card = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, json.JSONDecodeError) as error:
        raise ExportError(f"{path}: cannot be read: {error}") from None
    if not isinstance(card, dict) or card.get("format") != FORMAT or card.get("version") != VERSION:
        raise ExportError(f"{path}: not a {FORMAT} of version {VERSION}")
    weights = path.parent / card["weights"]
    if weights.name != card["weights"]:
        raise ExportError(f"{path}: names weights outside its own folder: {card['weights']!r}")
    architecture = card["architecture"]
    network = create(
        architecture["name"], architecture["num_classes"], architecture["in_channels"], **architecture["options"]
    )
    try:
        network.load_state_dict(load_file(weights))
    except (OSError, safetensors.SafetensorError, RuntimeError) as error:
        raise ExportError(f"{weights}: cannot be loaded into {architecture['name']}: {error}") from None
    return network.eval()


def load_command(architecture: dict[str, Any], weights: str) -> str:
    """Python that loads the network where it came from: in timm or torchvision with nothing of this project."""
    library, _, bare = str(architecture["name"]).rpartition("/")
    options = "".join(f", {key}={value!r}" for key, value in architecture["options"].items())
    classes, channels = architecture["num_classes"], architecture["in_channels"]
    if library == "torchvision" and channels == 3:
        build = f"torchvision.models.get_model({bare!r}, num_classes={classes}{options})"
    elif library == "timm" or (library not in LIBRARIES and _is_timm(bare)):
        build = f"timm.create_model({bare!r}, num_classes={classes}, in_chans={channels}{options})"
    else:
        build = f"models.create({architecture['name']!r}, {classes}, {channels}{options})"
    return f"network = {build}; network.load_state_dict(safetensors.torch.load_file({weights!r}))"


def _is_timm(name: str) -> bool:
    from models.libraries import is_known
    from models.registry import families

    return not any(family.pattern.fullmatch(name) for family in families()) and is_known("timm", name)


def _write(path: Path, content: bytes) -> None:
    # Whatever an earlier start has left there, or somebody has put there, is not written through.
    path.unlink(missing_ok=True)
    with path.open("xb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())


def same_outputs(one: nn.Module, other: nn.Module, images: torch.Tensor) -> bool:
    """Whether two networks in evaluation mode give equal logits. images [N, channels, H, W]."""
    with torch.inference_mode():
        return torch.equal(one(images), other(images))

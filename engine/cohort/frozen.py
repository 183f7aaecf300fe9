"""Peers that are trained already: they show their signals, and nothing of them changes."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from engine.config import PeerConfig
from engine.files import digest
from models.stages import plain_state


class Frozen(nn.Module):
    """A peer as it is called in training, without a graph. Its network is in evaluation mode: what it shows of an image
    depends on that alone, so neither on the other rows nor on the placement. It computes in the run's number format
    (`precision.amp`), as in an evaluation."""

    def __init__(self, peer: nn.Module) -> None:
        super().__init__()
        self.peer = peer

    @torch.no_grad()
    def forward(self, images: Tensor, below: Mapping[str, Tensor] | None = None) -> dict[str, Tensor]:
        """As `Peer.forward`, constant."""
        return self.peer(images, below)


@dataclass(frozen=True)
class Reference:
    """What stands for weights that a run does not save."""

    source: str
    """The path of their file, absolute, or whose published weights they are."""
    sha256: str
    """Of the file; of published weights, of the tensors."""


def reference(peer: PeerConfig, network: nn.Module) -> Reference:
    """That of a frozen peer whose weights are in `network`. Raises: OSError, where the file has gone meanwhile."""
    if isinstance(peer.pretrained, str):
        path = Path(peer.pretrained).resolve()
        return Reference(str(path), str(digest(path)["sha256"]))
    return Reference(f"the published weights of {peer.network}", digest_of(network))


def digest_of(network: nn.Module) -> str:
    """SHA-256 of all tensors that a network saves, in their order."""
    found = hashlib.sha256()
    for tensor in plain_state(network).values():
        found.update(tensor.detach().cpu().contiguous().flatten().numpy().tobytes())
    return found.hexdigest()

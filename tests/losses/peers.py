"""Peers as a method sees them, for tests of losses alone: what builds modules of `models` is not there."""

from __future__ import annotations

from collections.abc import Sequence

from torch import nn

from losses import PeerInfo


def peers(
    count: int, num_classes: int, num_features: int = 8, stages: Sequence[tuple[int, int]] = ()
) -> list[PeerInfo]:
    """`count` peers alike."""
    return [PeerInfo(k, num_classes, num_features, stages, _absent, _absent, _absent) for k in range(count)]


def _absent(*arguments: object) -> nn.Module:
    raise AssertionError(f"not built in this test: {arguments}")

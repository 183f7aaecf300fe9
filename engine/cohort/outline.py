"""What a method may know of a peer before any weight of it exists, and where the peer is tapped and cut for it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import partial

from torch import nn

import models
from engine.config import RunConfig
from losses import METHODS, Method, MethodOptions, PeerInfo
from losses.capabilities import StageTaps, trunk_of
from models import heads
from models.stages import Stage, stages
from models.weightless import weightless


@dataclass(frozen=True)
class Outline:
    """Of one peer: what the method may know, and the submodules to tap and to cut after."""

    info: PeerInfo
    taps: Mapping[str, str]
    inputs: Mapping[str, str]
    trunk: str | None


_SEEN: dict[tuple[object, ...], tuple[str, int, list[Stage]]] = {}
"""Classifier, width and stages of networks, which peers often have in common; to find them takes a pass."""


def outline(
    config: RunConfig,
    index: int,
    num_classes: int,
    channels: int,
    image_size: int,
    network: Callable[[], nn.Module],
) -> Outline:
    """What a method wants to know of a peer, found without memory for its weights, wherever the peer lives.

    Args:
        config: of the run.
        index: of the peer.
        num_classes: of the data, whose images have `channels` and are `image_size` pixels wide.
        network: builds the peer's network once more.

    Raises:
        ValueError: the network has no stages, or not those that the method wants.
    """
    peer, options, method = config.cohort[index][1], config.method, METHODS[config.method.name]
    auxiliary = partial(heads.auxiliary, peer.network, peer.options, num_classes, channels, image_size)
    info = PeerInfo(index, num_classes, 0, (), auxiliary, heads.Projection, network)
    shows_more = set(method.signals) - {"logits", "teacher"}
    looks_inside = method.head is not Method.head or looks_at_stages(method, options) or shows_more
    if not looks_inside:
        return Outline(info, {}, {}, None)
    staged = looks_at_stages(method, options)
    key = (peer.network, repr(sorted(peer.options.items())), num_classes, channels, image_size, staged)
    if key not in _SEEN:
        with weightless(peer.network):
            whole = models.create(peer.network, num_classes, channels, **peer.options)
        _SEEN[key] = (*models.pooled_features(whole), stages(whole, channels, image_size) if staged else [])
    classifier, width, found = _SEEN[key]
    tapped = method.taps(options, len(found)) if issubclass(method, StageTaps) else ()
    taps = {f"stage{j}": found[j - 1].module for j in tapped}
    trunk = trunk_of(method, options, len(found))
    if trunk is not None and trunk >= len(found):
        raise ValueError(f"the peers would share {trunk} stages of {len(found)}, and have none of their own")
    return Outline(
        replace(info, num_features=width, stages=tuple((stage.channels, stage.side) for stage in found)),
        taps,
        {"features": classifier},
        None if trunk is None else found[trunk - 1].module,
    )


def looks_at_stages(method: type[Method], options: MethodOptions) -> bool:
    """Whether a method wants feature maps or a trunk, which not every network has."""
    return issubclass(method, StageTaps) or trunk_of(method, options, 3) is not None

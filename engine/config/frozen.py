"""Peers that are trained networks: they teach, and learn nothing."""

from __future__ import annotations

from collections.abc import Sequence

from engine.config.sections import PeerConfig, PeerOptimizerConfig
from losses import METHODS, Method, MethodOptions
from losses.frozen import hindrance


def check_frozen(peers: Sequence[PeerConfig], method: type[Method], options: MethodOptions) -> None:
    """Refuses what a peer that is frozen as a whole cannot have, and methods that have no use for one.

    Raises:
        ValueError: with what was found and what was expected.
    """
    frozen = [(index, peer) for index, peer in enumerate(peers) if not peer.learns]
    if not frozen:
        return
    first = frozen[0][0]
    if (reason := hindrance(method, options)) is not None:
        able = [name for name, other in METHODS.items() if hindrance(other, other.Options(name=name)) is None]
        raise ValueError(
            f"peers.{first}.frozen = True: {options.name} has no use for a network that is trained already: {reason}; "
            f"expected method.name = {' or '.join(able)}, or parts of the network, such as [layer1]"
        )
    for index, peer in frozen:
        if not peer.pretrained:
            raise ValueError(
                f"peers.{index}.frozen = True: a peer that learns nothing would stay at random; expected "
                f"peers.{index}.pretrained, true or the path of a file of weights"
            )
        if peer.copies > 1:
            raise ValueError(
                f"peers.{index}.copies = {peer.copies}: a frozen peer's copies are all the same; expected 1"
            )
        if peer.optimizer != PeerOptimizerConfig():
            raise ValueError(f"peers.{index}.optimizer: a frozen peer has none; expected no values")
    if len(frozen) == len(peers):
        raise ValueError("peers: all of them are frozen, so nobody learns; expected one that is not")

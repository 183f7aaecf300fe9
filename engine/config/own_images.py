"""`data.image.of_networks`: images as the networks' libraries want them, written out as numbers."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from engine.config import ConfigError, RunConfig
from models.own_images import OwnImages, own_images


def with_own_images(config: RunConfig) -> dict[str, Any]:
    """The config as plain data, with the numbers in the place of the wish.

    Raises:
        ConfigError: nobody says what a network wants, or two peers want different things.
    """
    wanted: dict[str, OwnImages] = {}
    for index, peer in enumerate(config.peers):
        try:
            wanted[peer.network] = own_images(peer.network)
        except ValueError as error:
            raise ConfigError(f"data.image.of_networks = True: peers.{index}: {error}") from None
    first, *others = wanted
    for other in others:
        if wanted[other] != wanted[first]:
            one, two = (
                _shown(wanted[network], wanted[first if network == other else other]) for network in (first, other)
            )
            raise ConfigError(
                f"data.image.of_networks = True: {first} wants {one} and {other} wants {two}; all peers see the same "
                "images, expected size, resize and eval_interpolation as numbers"
            )
    own = wanted[first]
    raw = config.model_dump(mode="json")
    data, image = dict(raw["data"]), dict(raw["data"].get("image", {}))
    image |= {"size": own.size, "resize": own.resize, "eval_interpolation": own.interpolation}
    image.pop("of_networks", None)
    return {**raw, "data": {**data, "image": image, "mean": list(own.mean), "std": list(own.std)}}


def _shown(own: OwnImages, other: OwnImages) -> str:
    mine: Mapping[str, Any] = vars(own)
    return ", ".join(f"{key} {value}" for key, value in mine.items() if value != getattr(other, key))

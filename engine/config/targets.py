"""Whether targets, the loss they are held against, and the method go together."""

from __future__ import annotations

from typing import TYPE_CHECKING

from losses import METHODS

if TYPE_CHECKING:
    from engine.config.schema import RunConfig


def check_targets(config: RunConfig) -> None:
    """Refuses methods that need classes where there are probabilities, and options of a loss that is not there.

    Raises:
        ValueError: with what was found and what was expected.
    """
    augmentation, train = config.data.augmentation, config.train
    if augmentation.soft_targets and METHODS[config.method.name].needs_classes(config.method):
        name = config.method.name + (f" with ensemble = {ensemble}" if (ensemble := _ensemble(config)) else "")
        key = "data.augmentation.mixing" if augmentation.mixing.on else "data.augmentation.label_smoothing"
        raise ValueError(
            f"{key}: {name} has to know of which one class an image is, so images cannot be mixed nor labels smoothed; "
            "expected neither, or another method"
        )
    if train.loss != "binary_cross_entropy":
        for key, value in (("bce_threshold", train.bce_threshold), ("bce_sum", train.bce_sum or None)):
            if value is not None:
                raise ValueError(
                    f"train.{key} = {value}: has no meaning for train.loss = {train.loss}; it belongs to "
                    "binary_cross_entropy"
                )


def _ensemble(config: RunConfig) -> str | None:
    return getattr(config.method, "ensemble", None)

"""Whether targets, the loss they are held against, and the method go together."""

from __future__ import annotations

from data_pipelines import DataConfig
from engine.config.sections import TrainConfig
from losses import METHODS, MethodOptions


def check_targets(data: DataConfig, train: TrainConfig, method: MethodOptions) -> None:
    """Refuses methods that need classes where there are probabilities, and options of a loss that is not there.

    Raises:
        ValueError: with what was found and what was expected.
    """
    augmentation, ensemble = data.augmentation, getattr(method, "ensemble", None)
    if augmentation.soft_targets and METHODS[method.name].needs_classes(method):
        name = method.name + (f" with ensemble = {ensemble}" if ensemble else "")
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

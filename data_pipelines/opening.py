"""From a config to a pipeline."""

from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray

from data_pipelines import order, weights
from data_pipelines.config import DataConfig
from data_pipelines.contract import DataError, Pipeline
from data_pipelines.decoding.choice import choose
from data_pipelines.image_folder import ImageFolder
from data_pipelines.resident import ResidentSet
from data_pipelines.sampling import left_by
from data_pipelines.sources import npz
from data_pipelines.sources.opening import open_photos
from data_pipelines.sources.standard_sets import STANDARD, Split


@dataclass(frozen=True)
class Sizes:
    """How much there is of a data set."""

    train: int
    """Samples of the training split, those that are held out among them."""
    held_out: int
    eval: int
    classes: int
    left_out: int = 0
    """Samples of the training split beyond `DataConfig.fraction`."""
    remarks: tuple[str, ...] = ()
    """What there is beside, and is not used."""

    @property
    def trained_on(self) -> int:
        """Samples of the training split that are trained on."""
        return self.train - self.held_out - self.left_out


class _Found(NamedTuple):
    """What was seen of a data set, and what had to be read for that."""

    sizes: Sizes
    arrays: tuple[Split, Split, tuple[str, ...]] | None


def check_files(config: DataConfig) -> Sizes:
    """Looks at what is on disk, without touching any device.

    Raises:
        DataError: files are missing or of the wrong size, classes do not match, or there are fewer training samples
            or classes than a global batch has; or DALI is asked for and not installed.
    """
    return _look(config).sizes


def _look(config: DataConfig) -> _Found:
    arrays = None
    remarks: tuple[str, ...] = ()
    labels: NDArray[np.int64] | None = None
    if config.photos:
        # Whether there is a device for a mixed one is asked by who knows the device.
        choose(config.decoding.decoder, cuda=True)
        train, val = open_photos(config.where)
        labels, names, validation = train.labels, train.classes, len(val)
        remarks = (*train.remarks, *val.remarks)
    elif config.dataset == "npz":
        labels, validation, names = npz.sizes(config.folder, config.where.val_root)
    else:
        standard = STANDARD[config.dataset]
        size, validation = standard.sizes(config.folder)
        names = standard.class_names
        if config.fraction < 1:
            arrays = *standard.read(config.folder), names
            labels = arrays[0].labels
    size = used = size if labels is None else len(labels)
    if labels is not None and config.fraction < 1:
        used = int(order.fraction_sizes(np.bincount(labels), config.fraction).sum())
    if config.class_weights is not None:
        weights.given(config.class_weights, names)
    if config.held_out and not config.held_out_of(used):
        raise DataError(f"held_out: {config.held_out} of {used} training samples is less than one of them")
    left, classes = used - config.held_out_of(used), len(names)
    if config.global_batch > left:
        raise DataError(
            f"global_batch: expected at most the {left} training samples of {config.folder}{left_by(config)}, "
            f"found {config.global_batch}"
        )
    if config.sampler != "shuffle" and config.tuples > classes:
        raise DataError(
            f"global_batch: expected at most {classes * config.images_per_class} for sampler {config.sampler}, "
            f"images_per_class = {config.images_per_class} for each of {classes} classes, found {config.global_batch}"
        )
    return _Found(Sizes(size, used - left, validation, classes, size - used, remarks), arrays)


def open_pipeline(config: DataConfig, seed: int, device: torch.device) -> Pipeline:
    """Opens the data set on a device.

    Args:
        config: what to open.
        seed: of order and augmentation, 0 .. 2**64 - 1; the same on every rank.
        device: where the batches appear.

    Raises:
        DataError: see :func:`check_files`, and labels out of range, or a class with too few samples for
            `config.sampler`.
        ValueError: a mixed decoder is asked for on a device that is not CUDA.
    """
    found = _look(config)
    if config.photos:
        return ImageFolder(config, seed, device)
    return ResidentSet(config, seed, device, found.arrays)

"""From a config to a pipeline."""

from dataclasses import dataclass

import torch

from data_pipelines.config import DataConfig
from data_pipelines.contract import DataError, Pipeline
from data_pipelines.decoding.choice import choose
from data_pipelines.image_folder import ImageFolder
from data_pipelines.resident import ResidentSet
from data_pipelines.sources.opening import open_photos
from data_pipelines.sources.standard_sets import STANDARD


@dataclass(frozen=True)
class Sizes:
    """How much there is of a data set."""

    train: int
    """Samples of the training split, those that are held out among them."""
    held_out: int
    eval: int
    classes: int
    remarks: tuple[str, ...] = ()
    """What there is beside, and is not used."""


def check_files(config: DataConfig) -> Sizes:
    """Looks at what is on disk, without touching any device.

    Raises:
        DataError: files are missing or of the wrong size, classes do not match, or there are fewer training samples
            or classes than a global batch has; or DALI is asked for and not installed.
    """
    remarks: tuple[str, ...] = ()
    if config.photos:
        # Whether there is a device for a mixed one is asked by who knows the device.
        choose(config.decoding.decoder, cuda=True)
        train, val = open_photos(config.where)
        size, classes, validation = len(train), len(train.classes), len(val)
        remarks = (*train.remarks, *val.remarks)
    else:
        size, validation = STANDARD[config.dataset].sizes(config.folder)
        classes = len(STANDARD[config.dataset].class_names)
    if config.held_out and not config.held_out_of(size):
        raise DataError(f"held_out: {config.held_out} of {size} training samples is less than one of them")
    left = size - config.held_out_of(size)
    if config.global_batch > left:
        held_out = f" that held_out = {config.held_out} leaves" if config.held_out else ""
        raise DataError(
            f"global_batch: expected at most the {left} training samples of {config.folder}{held_out}, "
            f"found {config.global_batch}"
        )
    if config.sampler != "shuffle" and config.tuples > classes:
        raise DataError(
            f"global_batch: expected at most {classes * config.images_per_class} for sampler {config.sampler}, "
            f"images_per_class = {config.images_per_class} for each of {classes} classes, found {config.global_batch}"
        )
    return Sizes(size, size - left, validation, classes, remarks)


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
    check_files(config)
    if config.photos:
        return ImageFolder(config, seed, device)
    return ResidentSet(config, seed, device)

"""What every pipeline gives to the engine."""

from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch
from numpy.typing import NDArray

from data_pipelines.damage import Damage, DataError
from data_pipelines.order import Rows

__all__ = ["Batch", "DataError", "Pipeline", "Sharing"]


@dataclass(frozen=True)
class Batch:
    """Rows of a global batch, or of the validation split, on the device of the pipeline.

    Attributes:
        views: one or more augmentations of the same images, each float32 [n, C, H, W] in channels-last memory,
            normalised.
        targets: int64 [n], the class of each image, -1 for one of the validation split that cannot be read; of training
            images whose labels are smoothed or that are mixed, probabilities float32 [n, num_classes].
        ids: int64 [n], the position of each sample in its split; of the one that is shown in the place of one that
            cannot be read.
    """

    views: tuple[torch.Tensor, ...]
    targets: torch.Tensor
    ids: torch.Tensor

    @property
    def images(self) -> torch.Tensor:
        """The first view."""
        return self.views[0]

    def split(self, sizes: Sequence[int]) -> "list[Batch]":
        """Cuts the rows into parts of these sizes, in order."""
        rows = list(sizes)
        views = zip(*(view.split(rows) for view in self.views), strict=True)
        pieces = zip(views, self.targets.split(rows), self.ids.split(rows), strict=True)
        return [Batch(*piece) for piece in pieces]


class Sharing(Protocol):
    """What ranks of a node that need the same rows pass on to each other."""

    rows: NDArray[np.int64]
    """Of each global batch, ascending: those that are decoded here."""
    counted: NDArray[np.bool_]
    """Of these, those of which it is counted here if they cannot be read."""

    def swap(self, pixels: torch.Tensor, ids: NDArray[np.int64]) -> tuple[torch.Tensor, NDArray[np.int64]]:
        """All ranks that share call this for the same steps in the same order, each in one thread.

        Args:
            pixels: of the rows decoded here, uint8 [m, H, W, C].
            ids: int64 [m].

        Returns:
            Pixels and ids of the rows that are needed here, which are those given to `Pipeline.train`.
        """


class Pipeline(ABC):
    """An open data set.

    Attributes:
        sharing: how other ranks decode rows for this one, which whoever opened the data set may say before it is used.
        may_share: whether `sharing` has a meaning.
        counts: whether this rank counts what it cannot read; not where ranks that read the same do.
        damage: samples that could not be read, where any may be met.
        remarks: what whoever starts a run may want to know of how the data are read.
        num_classes: number of classes.
        channels: channels of an image.
        image_size: side of the square images, in pixels.
        train_size: samples of the training split that are trained on.
        class_weights: how much an image of each class counts in the loss, float32 [num_classes]; None: all alike.
        held_out_size: samples of the training split that are not, see `DataConfig.held_out`.
        eval_size: samples of the validation split.
        class_names: the name of each class, or None where nobody names them.
        global_batch: samples of one step, over all ranks.
        steps_per_epoch: whole global batches of an epoch, the same in every epoch; what is left over is dropped, so
            that shapes are static.
        train_targets: class of each sample of the training split, by its id: int64 [size], -1 for those
            that are held out or beyond `DataConfig.fraction`, which a memory of all samples must leave alone.
        contents: what the data set holds, see :func:`data_pipelines.digest.contents`; where it differs, the data do.
    """

    sharing: Sharing | None = None
    may_share: bool = False
    counts: bool = True
    remarks: tuple[str, ...] = ()
    damage: Damage | None = None
    num_classes: int
    channels: int
    image_size: int
    train_size: int
    held_out_size: int
    eval_size: int
    class_names: tuple[str, ...] | None
    global_batch: int
    steps_per_epoch: int
    train_targets: NDArray[np.int64]
    class_weights: NDArray[np.float32] | None = None
    contents: dict[str, str]

    @abstractmethod
    def train(self, epoch: int, first_step: int, rows: Rows, views: Sequence[int] = (0,)) -> Iterator[Batch]:
        """Yields one batch for each of the steps first_step .. steps_per_epoch - 1 of an epoch.

        Args:
            epoch: the epoch, from 0.
            first_step: the step of the epoch to begin with; the batches do not depend on it.
            rows: which rows of each global batch to give.
            views: which augmentations of them, 0, 1, ...; each is drawn independently and is the same in any company.

        Raises:
            DataError: a file cannot be read or decoded.
            ValueError: the rows part images that are mixed, see `DataConfig.tuple_size`.
        """

    @abstractmethod
    def evaluate(self, part: int, parts: int, batch: int) -> Iterator[Batch]:
        """Yields the rows of one part of the validation split in order, each exactly once.

        Args:
            part: which part, from 0.
            parts: in how many parts the split is cut; see :func:`data_pipelines.order.part`.
            batch: samples of a batch; the last one may be smaller, and an empty part yields nothing.

        Raises:
            DataError: a file cannot be read or decoded.
        """

    @abstractmethod
    def held_out(self, part: int, parts: int, batch: int) -> Iterator[Batch]:
        """Yields the training samples that are held out, as `evaluate` yields the validation split; `ids` are their
        positions in the training split.

        Raises:
            DataError: a file cannot be read or decoded.
        """

    def eval_path(self, index: int) -> str | None:
        """The file of a sample of the validation split; None where it has none of its own."""
        return None

    @abstractmethod
    def close(self) -> None:
        """Frees memory and threads; the pipeline is not used afterwards."""

"""For a method that knows the training set: the classes of all its images, and tables with a row for each.

Had by: lmcl, mcl.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Protocol

import torch
from torch import Tensor


class Table(Protocol):
    """Rows of numbers that all ranks read and write alike, wherever they lie."""

    def read(self, ids: Tensor) -> Tensor:
        """int64 [...] -> float32 [..., d], constant. Every rank must call it equally often, each with its own ids."""

    def write(self, ids: Tensor, rows: Tensor) -> None:
        """Puts [M, d] in the places [M], which differ from each other. Every rank must call it with the same."""


class MakeTable(Protocol):
    """Builds tables."""

    def __call__(
        self,
        size: int,
        width: int,
        dtype: torch.dtype,
        initial: Callable[[Tensor], Tensor],
        *,
        sharded: bool = False,
        differs_by_rank: bool = False,
    ) -> Table:
        """A table, which is an nn.Module and is saved with the run.

        Args:
            size: n, the number of rows.
            width: d.
            dtype: number format of the rows.
            initial: int64 [M] -> what stands in these rows at first, float32 [M, d].
            sharded: whether each rank keeps only a part of the rows.
            differs_by_rank: whether each rank begins with other rows; reading and writing are as ever.
        """


class Tables(ABC):
    """Is told of the training set before training."""

    @abstractmethod
    def prepare(self, classes: Tensor, make_table: MakeTable) -> None:
        """Takes what it needs to know of the data set. Submodules made here are saved with the run.

        Args:
            classes: int64 [n], the class of each training image by its position in the split; -1 for images that are
                never trained on.
            make_table: builds what is too large for every rank, or written by all.

        Raises:
            ValueError: the data set is not fit for the method, naming what is missing.
        """

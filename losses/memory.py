"""Memory banks: for every peer a row for each training image, with which embeddings are contrasted."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from losses.capabilities import MakeTable, Table
from losses.contrast import ContrastiveOptions
from losses.draws import ClassIndex, words

_IMAGES, _SHARED, _ROWS = 1, 2, 3
"""Streams of random numbers, which never change."""


class Memory(nn.Module):
    """One bank a peer, and the images that a batch is contrasted with.

    Args:
        options: of the method.
        num_peers: K.
        classes: int64 [n], the class of each training image; -1 for images that are never trained on.
        make_table: builds a table that all ranks read and write alike.
        key: of the random numbers.
        differs_by_rank: whether the banks begin differently on each rank.

    Raises:
        ValueError: naming a class of which not enough images can be drawn.
    """

    classes: Tensor

    def __init__(
        self,
        options: ContrastiveOptions,
        num_peers: int,
        classes: Tensor,
        make_table: MakeTable,
        key: tuple[int, int],
        *,
        differs_by_rank: bool = False,
    ) -> None:
        super().__init__()
        self._options, self._key = options, key
        self.index = ClassIndex(classes, options.positives)
        self.register_buffer("classes", classes, persistent=False)
        dtype = torch.bfloat16 if options.bank_dtype == "bf16" else torch.float32
        tables = [
            make_table(
                len(classes),
                options.width,
                dtype,
                self._initial(k),
                sharded=options.bank_sharded,
                differs_by_rank=differs_by_rank,
            )
            for k in range(num_peers)
        ]
        self.banks: Sequence[Table] = nn.ModuleList(tables)  # type: ignore[assignment,arg-type]

    def _initial(self, bank: int) -> Callable[[Tensor], Tensor]:
        """Rows from U(-s, s) with s = sqrt(3 / d), whose length is about 1, a function of the image alone."""
        width = self._options.width

        def rows(ids: Tensor) -> Tensor:
            drawn = words(self._key, _ROWS + (bank << 8), 0, ids, width)
            return (drawn.double() * 2.0**-31 - 1).float() * math.sqrt(3 / width)

        return rows

    def images(self, ids: Tensor, targets: Tensor, step: int) -> Tensor:
        """Draws what the images of a batch are contrasted with.

        Args:
            ids: int64 [N], the images.
            targets: int64 [N], their classes.
            step: of the run.

        Returns:
            int64 [N, 1 + P + Q]: the image itself, class mates, and images of other classes, these with replacement.
            Without the last where negatives are shared.
        """
        options = self._options
        count = options.positives + (0 if options.shared_negatives else options.num_negatives)
        drawn = words(self._key, _IMAGES, step, ids, count)
        mates = self.index.mates(drawn[:, : options.positives], targets)
        others = self.index.others(drawn[:, options.positives :], targets)
        return torch.cat([ids.unsqueeze(1), mates, others], 1)

    def products(self, ids: Tensor, targets: Tensor, step: int) -> Callable[[int, Tensor, slice], Tensor]:
        """The argument `products` of `losses.contrast.rows_in_memory`; arguments as for `images`.

        Shared negatives are drawn from all images, the same for all rows of the global batch; the products with those
        of the anchor's class are so small that they do not count.
        """
        columns = self.images(ids, targets, step)
        if not self._options.shared_negatives:
            return lambda bank, live, rows: _with_own(live, self.banks[bank].read(columns[rows]))

        one = torch.zeros(1, dtype=torch.int64, device=ids.device)
        negatives = self.index.anyone(words(self._key, _SHARED, step, one, self._options.num_negatives)[0])
        same = self.classes[negatives] == targets.unsqueeze(1)

        def products(bank: int, live: Tensor, rows: slice) -> Tensor:
            own = _with_own(live, self.banks[bank].read(columns[rows]))
            common = live @ self.banks[bank].read(negatives).to(live.dtype).T
            return torch.cat([own, common.masked_fill(same[rows], -1e4)], -1)

        return products

    @torch.no_grad()
    def update(self, ids: Tensor, embeddings: Sequence[Tensor], skipped: Tensor) -> None:
        """m <- normalise(mu m + (1 - mu) e) in the rows of these images; all ranks call with the same images.

        Args:
            ids: int64 [G].
            embeddings: [G, d] of each peer.
            skipped: [1], 1 where nothing shall change.
        """
        mu = self._options.bank_momentum
        for bank, e in zip(self.banks, embeddings, strict=True):
            before = bank.read(ids)
            after = F.normalize(mu * before + (1 - mu) * e, dim=-1)
            bank.write(ids, torch.where(skipped > 0, before, after))


def _with_own(live: Tensor, rows: Tensor) -> Tensor:
    """Products of each embedding [M, N, d] with the rows [N, C, d] of its image -> [M, N, C]."""
    return torch.bmm(live.transpose(0, 1), rows.to(live.dtype).mT).transpose(0, 1)

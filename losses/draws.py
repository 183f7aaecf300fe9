"""Random numbers that are a function of a key and a counter, drawn where they are used.

Philox4x32-10 (Salmon, Moraes, Dror, Shaw, "Parallel random numbers: as easy as 1, 2, 3", SC 2011) in tensor operations:
any sample of any step has its own numbers on any device, whoever asks for them and in whatever order.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

_MULTIPLIERS = 0xD2511F53, 0xCD9E8D57
_WEYL = 0x9E3779B9, 0xBB67AE85
_LOW = 0xFFFFFFFF


def philox(counter: Sequence[Tensor | int], key: Sequence[int]) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Four words of 32 bits for each counter.

    Args:
        counter: four words, int64 in 0 .. 2^32 - 1, tensors that broadcast against each other or plain numbers.
        key: two words in 0 .. 2^32 - 1.

    Returns:
        Four int64 tensors in 0 .. 2^32 - 1 of the counters' common shape.
    """
    # Numbers stay numbers until they meet a tensor: made into one, they would have to be sent to its device.
    c0, c1, c2, c3 = counter
    k0, k1 = key
    for _ in range(10):
        # The product wraps around in int64; its bits are the right ones, and the mask takes away the sign's copies.
        left, right = c0 * _MULTIPLIERS[0], c2 * _MULTIPLIERS[1]
        c0, c2 = (right >> 32 & _LOW) ^ c1 ^ k0, (left >> 32 & _LOW) ^ c3 ^ k1
        c1, c3 = right & _LOW, left & _LOW
        k0, k1 = k0 + _WEYL[0] & _LOW, k1 + _WEYL[1] & _LOW
    found = torch.broadcast_tensors(*(torch.as_tensor(x) for x in (c0, c1, c2, c3)))
    return found[0], found[1], found[2], found[3]


def words(key: Sequence[int], stream: int, step: int, ids: Tensor, count: int) -> Tensor:
    """`count` words of 32 bits for each of the samples `ids` [N] at one step: int64 [N, count].

    Args:
        key: two words in 0 .. 2^32 - 1.
        stream: keeps the numbers for different purposes apart, 0 .. 2^32 - 1.
        step: of the run.
        ids: int64 [N], in 0 .. 2^32 - 1.
        count: words of a sample.
    """
    blocks = torch.arange((count + 3) // 4, device=ids.device)
    four = philox((blocks, ids.unsqueeze(1), step & _LOW, stream), key)
    return torch.stack(four, 2).flatten(1)[:, :count]


def below(drawn: Tensor, limit: Tensor | int) -> Tensor:
    """Words of 32 bits -> whole numbers 0 .. limit - 1, int64, each as likely as the others but for limit / 2^32."""
    return drawn * limit >> 32


class ClassIndex(torch.nn.Module):
    """The training samples by class, from which class mates and others are drawn without a table for each class.

    Args:
        classes: int64 [n], the class of each training sample; -1 for samples that are never trained on.

    Raises:
        ValueError: naming the first class that has fewer samples than `least`, or that has all samples.
    """

    by_class: Tensor
    starts: Tensor
    counts: Tensor

    def __init__(self, classes: Tensor, least: int) -> None:
        super().__init__()
        trained_on = int((classes >= 0).sum())
        counts = torch.bincount(classes[classes >= 0])
        for c, count in enumerate(counts.tolist()):
            if 0 < count < least:
                raise ValueError(
                    f"class {c} has {count} training samples, positives = {least} needs as many to draw from"
                )
            if count == trained_on:
                raise ValueError(f"all {count} training samples are of class {c}: there are no negatives to draw")
        order = torch.argsort(classes, stable=True)[len(classes) - trained_on :]
        # Made from the data set each time: a checkpoint need not hold them.
        self.register_buffer("by_class", order, persistent=False)
        self.register_buffer("starts", counts.cumsum(0) - counts, persistent=False)
        self.register_buffer("counts", counts, persistent=False)

    def mates(self, drawn: Tensor, targets: Tensor) -> Tensor:
        """Samples of the same class, different ones in a row; the sample itself may be among them.

        Args:
            drawn: words int64 [N, P].
            targets: int64 [N].

        Returns:
            ids int64 [N, P].
        """
        start, count = self.starts[targets], self.counts[targets]
        taken: list[Tensor] = []
        for p in range(drawn.shape[1]):
            place = below(drawn[:, p], count - p)
            # The p-th of those that are left: step over each earlier one that is not above it.
            for earlier in torch.stack(taken).sort(0).values if taken else ():
                place = place + (earlier <= place)
            taken.append(place)
        return self.by_class[start.unsqueeze(1) + torch.stack(taken, 1)]

    def others(self, drawn: Tensor, targets: Tensor) -> Tensor:
        """Samples of other classes, with replacement: words int64 [N, Q], targets [N] -> ids int64 [N, Q]."""
        start, count = self.starts[targets].unsqueeze(1), self.counts[targets].unsqueeze(1)
        place = below(drawn, len(self.by_class) - count)
        return self.by_class[torch.where(place < start, place, place + count)]

    def anyone(self, drawn: Tensor) -> Tensor:
        """Samples of any class, with replacement: words int64 -> ids of the same shape."""
        return self.by_class[below(drawn, len(self.by_class))]

"""Arithmetic that several methods share: pure functions, in float32."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor


def cross_entropy(logits: Tensor, targets: Tensor, *, weight: Tensor | None = None) -> Tensor:
    """CE(z, y), the mean over rows of -sum_c w_c y_c log softmax(z)_c. logits [N, C], targets [N] or [N, C] -> scalar.

    Args:
        weight: w of each class, [C]; None: all 1. PyTorch's, but the mean is over rows for class indices as well, where
            PyTorch divides by the sum of the rows' weights: that would depend on which rows a rank has.
    """
    if weight is None:
        return F.cross_entropy(logits.float(), targets)
    return F.cross_entropy(logits.float(), targets, weight=weight, reduction="none").mean()


def binary_cross_entropy(
    logits: Tensor,
    targets: Tensor,
    *,
    threshold: float | None = None,
    sum_classes: bool = False,
    weight: Tensor | None = None,
) -> Tensor:
    """The mean over rows and classes of -t log s(z) - (1 - t) log(1 - s(z)), s the logistic function: timm's
    BinaryCrossEntropy. logits [N, C], targets [N] or [N, C] -> scalar.

    Args:
        threshold: where targets are probabilities, those above it become 1 and the others 0; None: t = y.
        sum_classes: the sum over classes in the place of their mean.
        weight: w of each class, [C]: a row counts sum_c w_c y_c times; None: once.
    """
    wanted = targets
    if not targets.is_floating_point():
        wanted = torch.zeros_like(logits, dtype=torch.float32).scatter_(1, targets[:, None], 1.0)
    if threshold is not None:
        wanted = (wanted > threshold).to(wanted.dtype)
    terms = F.binary_cross_entropy_with_logits(logits.float(), wanted, reduction="none")
    if weight is None:
        return terms.sum(-1).mean() if sum_classes else terms.mean()
    rows = targets @ weight if targets.is_floating_point() else weight[targets]
    return (rows * (terms.sum(-1) if sum_classes else terms.mean(-1))).mean()


def classifier(
    loss: str, *, threshold: float | None = None, sum_classes: bool = False
) -> Callable[[Tensor, Tensor], Tensor]:
    """What `train.loss` names, with its options; see `binary_cross_entropy`."""
    if loss == "cross_entropy":
        return cross_entropy
    return partial(binary_cross_entropy, threshold=threshold, sum_classes=sum_classes)


def tempered_log_softmax(logits: Tensor, temperature: float) -> Tensor:
    """log softmax(z / T) over classes, in float32. logits [N, C] -> [N, C]."""
    # Dividing by 1 would be a pass over the logits, and another on the way back.
    tempered = logits.float() if temperature == 1 else logits.float() / temperature
    return F.log_softmax(tempered, dim=-1)


def cross_term(probabilities: Tensor, log_probabilities: Tensor) -> Tensor:
    """sum_c q log p, the mean over rows: what of KL(q || p) depends on p, negated. [N, C], [N, C] -> scalar."""
    return (probabilities * log_probabilities).sum(-1).mean()


def sum_of_others(tensors: Sequence[Tensor], k: int) -> Tensor:
    """sum_{j != k} of equally shaped tensors. Added up rather than taken from the total, which would cancel."""
    others = [x for j, x in enumerate(tensors) if j != k]
    return others[0] if len(others) == 1 else torch.stack(others).sum(0)


def mean_of_others(tensors: Sequence[Tensor], k: int) -> Tensor:
    """The mean over j != k of equally shaped tensors."""
    return sum_of_others(tensors, k) / (len(tensors) - 1) if len(tensors) > 2 else sum_of_others(tensors, k)


def tempered_kl(student_logits: Tensor, teacher_logits: Tensor, temperature: float) -> Tensor:
    """KL(softmax(t / T) || softmax(z / T)), the sum over classes and the mean over rows. [N, C], [N, C] -> scalar.

    Exact logarithms in float32: the 1e-7 that ONE, FFL and OKDDip add to the teacher's probabilities is left out. The
    gradient reaches whichever of the two carries one; who wants a constant teacher detaches it.
    """
    log_p = tempered_log_softmax(student_logits, temperature)
    log_q = tempered_log_softmax(teacher_logits, temperature)
    return F.kl_div(log_p, log_q, reduction="batchmean", log_target=True)


def distillation(student_logits: Tensor, teacher_logits: Tensor, temperature: float) -> Tensor:
    """T^2 KL(softmax(t / T) || softmax(z / T)), see `tempered_kl`. [N, C], [N, C] -> scalar."""
    return temperature**2 * tempered_kl(student_logits, teacher_logits, temperature)


def ramp_up(epoch: int, length: int) -> float:
    """exp(-5 (1 - min(e, L) / L)^2): from 0.0067 in epoch 0 up to 1 from epoch L on. A length of 0 means no ramp: 1.

    Args:
        epoch: e, counted from 0 and constant within an epoch (`Progress.epoch`).
        length: L, in epochs.
    """
    return math.exp(-5 * (1 - min(epoch, length) / length) ** 2) if length else 1.0


def flat(tensors: Sequence[Tensor]) -> Tensor:
    """A copy of all elements in one row, each tensor's in the order of its indices whatever its memory format."""
    with torch.no_grad():
        return torch.cat([x if x.ndim == 1 else x.reshape(-1) for x in tensors])


def fill(tensors: Sequence[Tensor], row: Tensor) -> None:
    """Writes what `flat` gave back into the tensors, or into others of the same shapes, in one go."""
    with torch.no_grad():
        pieces = row.split([x.numel() for x in tensors])
        shaped = [piece if x.ndim == 1 else piece.view(x.shape) for piece, x in zip(pieces, tensors, strict=True)]
        torch._foreach_copy_(list(tensors), shaped)

"""Arithmetic that several methods share: pure functions, in float32."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import overload

import torch
import torch.nn.functional as F
from torch import Tensor


def cross_entropy(
    logits: Tensor, targets: Tensor, *, log_p: Tensor | None = None, weight: Tensor | None = None
) -> Tensor:
    """CE(z, y), the mean over rows of -sum_c w_c y_c log softmax(z)_c. logits [N, C], targets [N] or [N, C] -> scalar.

    Args:
        log_p: log softmax(z) [N, C], where the caller has it: the logits are then not read again.
        weight: w of each class, [C]; None: all 1. PyTorch's, but the mean is over rows for class indices as well, where
            PyTorch divides by the sum of the rows' weights: that would depend on which rows a rank has.
    """
    if log_p is None:
        if weight is None:
            return F.cross_entropy(logits.float(), targets)
        return F.cross_entropy(logits.float(), targets, weight=weight, reduction="none").mean()
    if targets.is_floating_point():
        return -cross_term(targets if weight is None else targets * weight, log_p)
    if weight is None:
        return F.nll_loss(log_p, targets)
    return F.nll_loss(log_p, targets, weight=weight, reduction="none").mean()


def binary_cross_entropy(
    logits: Tensor,
    targets: Tensor,
    *,
    log_p: Tensor | None = None,
    threshold: float | None = None,
    sum_classes: bool = False,
    weight: Tensor | None = None,
) -> Tensor:
    """The mean over rows and classes of -t log s(z) - (1 - t) log(1 - s(z)), s the logistic function: timm's
    BinaryCrossEntropy. logits [N, C], targets [N] or [N, C] -> scalar.

    Args:
        log_p: not looked at; where all classes share a softmax, `cross_entropy` has a use for it.
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


def classifier(loss: str, *, threshold: float | None = None, sum_classes: bool = False) -> Callable[..., Tensor]:
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
    return (probabilities * log_probabilities).sum() / len(probabilities)


def others(num_peers: int, like: Tensor, *, mean: bool = False) -> Tensor:
    """[K, K] on the device of `like`: 0 on the diagonal, elsewhere 1, or 1 / (K - 1) for the mean of the others."""
    weight = 1 / (num_peers - 1) if mean else 1.0
    return torch.full((num_peers, num_peers), weight, device=like.device, dtype=like.dtype).fill_diagonal_(0)


def mixed(weights: Tensor, x: Tensor) -> Tensor:
    """sum_j w_mj x_j by one product. [M, K], [K, ...] -> [M, ...]."""
    return (weights @ x.reshape(len(x), -1)).view(-1, *x.shape[1:])


@dataclass(frozen=True)
class Mixtures:
    r"""Constant teachers j, each of which is read once, in M mixtures of weights w_mj: since

        \sum_j w_mj KL(q_j || p) = \sum_j w_mj <q_j, log q_j> - <\sum_j w_mj q_j, log p>,

    who learns from a mixture has one pass over its own log p to make, however many teachers there are.
    """

    q: Sequence[Tensor]
    r"""\sum_j w_mj q_j [N, C] of each mixture."""
    own: Sequence[Tensor]
    r"""\sum_j w_mj <q_j, log q_j - c>, means over rows."""
    common: Tensor
    """c [N, C], the mean of the teachers' log q. Both terms are less by it: the difference of two large numbers would
    leave few digits of a small KL."""

    def kl(self, m: int, log_p: Tensor) -> Tensor:
        """The weighted sum of mixture m, the mean over rows. log_p [N, C] -> scalar."""
        return self.own[m] - cross_term(self.q[m], log_p - self.common)


@torch.no_grad()
def mixtures(log_q: Sequence[Tensor], weights: Tensor) -> Mixtures:
    """What M mixtures, by `weights` [M, K], of K teachers say, whose log q are each [N, C]."""
    stacked = torch.stack(list(log_q))
    q, common = stacked.exp(), stacked.mean(0)
    own = stacked.sub_(common).mul_(q).sum(-1).mean(-1)
    return Mixtures(mixed(weights, q).unbind(), (weights @ own).unbind(), common)


def divergence(log_p: Tensor, log_q: Tensor) -> Tensor:
    """KL(q || p), the sum over classes and the mean over rows, of log probabilities [N, C], [N, C] -> scalar."""
    return F.kl_div(log_p, log_q, reduction="batchmean", log_target=True)


def tempered_kl(student_logits: Tensor, teacher_logits: Tensor, temperature: float) -> Tensor:
    """KL(softmax(t / T) || softmax(z / T)), the sum over classes and the mean over rows. [N, C], [N, C] -> scalar.

    Exact logarithms in float32: the 1e-7 that ONE, FFL and OKDDip add to the teacher's probabilities is left out. The
    gradient reaches whichever of the two carries one; who wants a constant teacher detaches it. Where one of the two is
    met again, `tempered_log_softmax` of it is taken once and given to `divergence`.
    """
    return divergence(
        tempered_log_softmax(student_logits, temperature), tempered_log_softmax(teacher_logits, temperature)
    )


@overload
def ramp_up(epoch: int, length: int) -> float: ...
@overload
def ramp_up(epoch: Tensor, length: int) -> Tensor | float: ...
def ramp_up(epoch: int | Tensor, length: int) -> Tensor | float:
    """exp(-5 (1 - min(e, L) / L)^2): from 0.0067 in epoch 0 up to 1 from epoch L on. A length of 0 means no ramp: 1.

    Args:
        epoch: e, counted from 0 and constant within an epoch (`Progress.epoch`); a tensor [] where the objective is
            compiled.
        length: L, in epochs.
    """
    if not length:
        return 1.0
    if isinstance(epoch, Tensor):
        return torch.exp(-5 * (1 - epoch.clamp_max(length) / length) ** 2)
    return math.exp(-5 * (1 - min(epoch, length) / length) ** 2)


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

"""Arithmetic that several methods share: pure functions, in float32."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor


def cross_entropy(logits: Tensor, targets: Tensor) -> Tensor:
    """CE(z, y), the mean over rows of -log softmax(z)[y]. logits [N, C], targets [N] -> scalar."""
    return F.cross_entropy(logits.float(), targets)


def tempered_log_softmax(logits: Tensor, temperature: float) -> Tensor:
    """log softmax(z / T) over classes, in float32. logits [N, C] -> [N, C]."""
    return F.log_softmax(logits.float() / temperature, dim=-1)


def negative_entropy(log_probabilities: Tensor) -> Tensor:
    """sum_c p log p, the mean over rows. log_probabilities [N, C], finite -> scalar."""
    return (log_probabilities.exp() * log_probabilities).sum(-1).mean()


def cross_term(probabilities: Tensor, log_probabilities: Tensor) -> Tensor:
    """sum_c q log p, the mean over rows: what of KL(q || p) depends on p, negated. [N, C], [N, C] -> scalar."""
    return (probabilities * log_probabilities).sum(-1).mean()


def sum_of_others(tensors: Sequence[Tensor], k: int) -> Tensor:
    """sum_{j != k} of equally shaped tensors. Added up rather than taken from the total, which would cancel."""
    return torch.stack([x for j, x in enumerate(tensors) if j != k]).sum(0)

"""How far confidence can be trusted: the expected calibration error of Guo et al. 2017, arXiv 1706.04599, eq. 3."""

from __future__ import annotations

import torch
from torch import Tensor

BINS = 15
"""Of equal width, (0, 1/15] to (14/15, 1]."""


def excess(probabilities: Tensor, targets: Tensor) -> Tensor:
    """What images add to each bin: the sum of confidence less that of right answers.

    Sums over batches add up, and sum_b |excess_b| / n is the error: |B_b| / n |acc(B_b) - conf(B_b)| summed over b.

    Args:
        probabilities: [K, N, C] float64, of K networks.
        targets: [N] int64; negative where there is no image, which adds nothing.

    Returns:
        [K, BINS] float64.
    """
    confidence, named = probabilities.max(-1)
    places = ((confidence * BINS).ceil().long() - 1).clamp(0, BINS - 1)
    differences = (confidence - (named == targets).double()) * (targets >= 0)
    return torch.zeros(len(probabilities), BINS, dtype=torch.float64, device=probabilities.device).scatter_add_(
        1, places, differences
    )

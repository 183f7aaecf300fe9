"""Deep Communication Learning: peers that mix their parameters.

Source: github.com/mlimwxxnn/Deep-Communication-Learning, commit 47e0e07; no paper was found.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch
from pydantic import Field, model_validator
from torch import Tensor

from losses.capabilities import ActsAfterStep, AfterStep
from losses.contract import Method, MethodOptions, Progress, Signals, Terms
from losses.functional import fill, flat


class DCLOptions(MethodOptions):
    """Options of `dcl`."""

    name: Literal["dcl"] = "dcl"
    interval: int = Field(
        10,
        ge=1,
        description="steps between two communications, counted anew from the start of each epoch; "
        "individually_train_batch_size in the source",
    )
    beta: float = Field(0.1, ge=0, le=1, description="how far each peer moves to the mixture")
    combine: Literal["abs", "mean"] = Field(
        "abs", description="abs: mean sign times harmonic mean of magnitudes (the source); mean: the arithmetic mean"
    )
    epsilon: Literal["exact", "published"] = Field(
        "exact",
        description="abs: exact leaves out the 1e-18 that the source adds to the denominator; published adds it, which "
        "takes small weights to 0, with 8 peers those below about 2e-3",
    )

    @model_validator(mode="after")
    def _epsilon_belongs_to_abs(self) -> DCLOptions:
        if self.combine == "mean" and self.epsilon == "published":
            raise ValueError("epsilon = published: only combine = abs has an epsilon, found combine = mean")
        return self


class DCL(ActsAfterStep, Method):
    r"""L_k = CE(z_k, y); every `interval` steps the peers' parameters w_k are mixed, element by element:

        w_k <- \beta \bar{w} + (1 - \beta) w_k

    with the mean \bar{w} = 1/K \sum_k w_k, or by the rule `abs`, with m_k = |\prod_{j != k} w_j|,

        \bar{w} = \sum_k m_k w_k / \sum_k m_k = \sum_k sign(w_k) / \sum_k 1/|w_k|    (0 where any w_k is 0)

    All parameters take part, those of BatchNorm too; its statistics and the optimisers' momentum do not. Step i of an
    epoch, counted from 0, ends with a communication where i + 1 is a multiple of `interval`. Nothing else is exchanged:
    4 bytes a parameter, in one collective, every `interval` steps.
    """

    name = "dcl"
    Options = DCLOptions
    options: DCLOptions
    exchange = "none"
    alike = True

    @classmethod
    def check(cls, options: DCLOptions, num_peers: int) -> None:
        if num_peers < 2:
            raise ValueError("dcl needs at least 2 peers to mix their parameters, found 1")

    def forward(
        self, residents: Sequence[int], signals: Sequence[Signals], targets: Tensor, progress: Progress
    ) -> Terms:
        return {(k, "ce"): self.classify(signals[k]["logits"], targets) for k in residents}

    @torch.no_grad()
    def after_step(self, after: AfterStep) -> None:
        within_epoch = after.progress.step % after.progress.steps_per_epoch
        if (within_epoch + 1) % self.options.interval:
            return
        # A peer's parameters in one row: a few kernels, and one collective, instead of one for each tensor.
        own = {k: list(peer.parameters()) for k, peer in after.residents.items()}
        everyones = after.exchange({k: {"parameters": flat(parameters)} for k, parameters in own.items()})
        rows = [peer["parameters"] for peer in everyones]
        mixed = self._mix(rows)
        for k, parameters in own.items():
            # Everywhere or nowhere, and the host need not know.
            fill(parameters, torch.where(after.skipped > 0, rows[k], rows[k].lerp(mixed, self.options.beta)))

    def _mix(self, rows: Sequence[Tensor]) -> Tensor:
        if self.options.combine == "mean":
            return mix_mean(rows)
        return mix_abs(rows) if self.options.epsilon == "exact" else mix_abs_published(rows)


def mix_mean(rows: Sequence[Tensor]) -> Tensor:
    """1/K sum_k w_k. K tensors of one shape -> that shape."""
    total = rows[0]
    for w in rows[1:]:
        total = total + w
    return total / len(rows)


def mix_abs(rows: Sequence[Tensor]) -> Tensor:
    """sum_k sign(w_k) / sum_k 1/|w_k|, and 0 where any w_k is 0. K tensors of one shape -> that shape.

    In units of the smallest magnitude m = min_k |w_k|: m sum_k sign(w_k) / sum_k (m / |w_k|). The ratios lie in [0, 1]
    and the largest is 1, so that nothing overflows or vanishes in float32, denormals and any K included.
    """
    smallest = rows[0].abs()
    for w in rows[1:]:
        smallest = torch.minimum(smallest, w.abs())
    signs, ratios = torch.zeros_like(smallest), torch.zeros_like(smallest)
    for w in rows:
        signs += w.sign()
        ratios += smallest / w.abs()  # 0 / 0 where w is 0, which is not looked at
    return torch.where(smallest > 0, smallest * (signs / ratios), 0.0)


def mix_abs_published(rows: Sequence[Tensor]) -> Tensor:
    """sum_k m_k w_k / (sum_k m_k + 1e-18) with m_k = |prod_{j != k} w_j|, as the source computes it.

    K tensors of one shape -> that shape. For equal peers that is w / (1 + 1e-18 / (K |w|^(K-1))).
    """
    weighted, total = torch.zeros_like(rows[0]), torch.full_like(rows[0], 1e-18)
    for k, w in enumerate(rows):
        m = torch.ones_like(w)
        for j, other in enumerate(rows):
            if j != k:
                m = m * other
        weighted += m.abs() * w
        total += m.abs()
    return weighted / total

"""Collaborative Learning, with ILR (Song, Chai; NeurIPS 2018, arXiv 1805.11761)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor

from losses.capabilities import SharedTrunk
from losses.contract import Method, MethodOptions, Progress, Signals, Terms
from losses.functional import mixed, others, ramp_up, tempered_kl


class CLILROptions(MethodOptions):
    """Options of `cl_ilr`. The defaults are the paper's; OKDDip's code has `beta: null, temperature: 3,
    times_t_squared: true, ramp_up_epochs: 80, teacher: attached`."""

    name: Literal["cl_ilr"] = "cl_ilr"
    beta: float | None = Field(
        0.5,
        ge=0,
        le=1,
        description="weight of the cross-entropy, that of the KL term being 1 - beta; null: both weigh 1 (OKDDip)",
    )
    temperature: float = Field(2.0, gt=0, description="T of both softmaxes: 2 in the paper, 3 in OKDDip's code")
    times_t_squared: bool = Field(
        False, description="whether the KL term is multiplied by T^2: not in the paper, in OKDDip's code"
    )
    ramp_up_epochs: int = Field(
        0, ge=0, description="epochs in which the KL term gains its weight: 0 in the paper, 80 in OKDDip's code"
    )
    teacher: Literal["constant", "attached"] = Field(
        "constant",
        description="whether the mean of the others is constant (paper) or carries gradient to them (OKDDip's code)",
    )


class CLILR(SharedTrunk, Method):
    r"""The heads of one network learn from the mean logits of the other heads.

    With K heads, logits z_k [N, C], means over rows, w(e) the ramp-up (`losses.functional.ramp_up`) and T^2 only where
    `times_t_squared` asks for it,

        L = \sum_k [ \beta CE(z_k, y) + (1 - \beta) w(e) T^2 KL(softmax(m_k / T) || softmax(z_k / T)) ],
        m_k = 1/(K-1) \sum_{j != k} z_j.

    With m_k constant the KL has the gradient of the paper's soft cross-entropy; the two differ by the entropy of the
    target. All stages but the last are shared, and follow the mean of the heads' gradients: the paper's rescaling of
    what comes back at the split, here one split.
    """

    name = "cl_ilr"
    Options = CLILROptions
    deployed = "first"
    options: CLILROptions
    trunk_gradient: ClassVar[Literal["sum", "mean"]] = "mean"

    @classmethod
    def check(cls, options: CLILROptions, num_peers: int) -> None:
        if num_peers < 2:
            raise ValueError("cl_ilr needs at least 2 peers to teach each other, found 1")

    @classmethod
    def trunk(cls, options: CLILROptions, num_stages: int) -> int:
        return num_stages - 1

    def forward(
        self, residents: Sequence[int], signals: Sequence[Signals], targets: Tensor, progress: Progress
    ) -> Terms:
        options, logits = self.options, [peer["logits"] for peer in signals]
        hard, soft = (1.0, 1.0) if options.beta is None else (options.beta, 1 - options.beta)
        soft *= ramp_up(progress.epoch, options.ramp_up_epochs)
        soft *= options.temperature**2 if options.times_t_squared else 1

        stacked = torch.stack([z.float() for z in logits])
        shown = stacked.detach() if options.teacher == "constant" else stacked
        teachers = mixed(others(len(logits), shown, mean=True), shown).unbind()

        def kl(k: int) -> Tensor:
            return soft * tempered_kl(logits[k], teachers[k], options.temperature)

        terms: Terms = {(k, "ce"): hard * self.classify(logits[k], targets) for k in residents}
        if options.teacher == "attached":  # every peer is in every KL term
            terms[None, "kl"] = torch.stack([kl(k) for k in range(self.num_peers)]).sum()
        else:
            terms |= {(k, "kl"): kl(k) for k in residents}
        return terms

"""Independent training: every peer alone, by cross-entropy. The baseline that every method is compared with."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

from torch import Tensor

from losses.contract import Method, MethodOptions, Progress, Signals, Terms


class IndependentOptions(MethodOptions):
    """`independent` has no options."""

    name: Literal["independent"] = "independent"


class Independent(Method):
    """L_k = CE(z_k, y). Nothing is exchanged."""

    name = "independent"
    Options = IndependentOptions
    exchange = "none"

    def forward(
        self, residents: Sequence[int], signals: Sequence[Signals], targets: Tensor, progress: Progress
    ) -> Terms:
        return {(k, "ce"): self.classify(signals[k]["logits"], targets) for k in residents}

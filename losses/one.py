"""ONE, an on-the-fly native ensemble (Lan, Zhu, Gong; NeurIPS 2018, arXiv 1806.04606)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar, Literal

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn

from losses.capabilities import SharedTrunk
from losses.contract import Method, MethodOptions, PeerInfo, Progress, Signals, Terms
from losses.functional import divergence, ramp_up, tempered_log_softmax


class ONEOptions(MethodOptions):
    """Options of `one`."""

    name: Literal["one"] = "one"
    temperature: float = Field(3.0, gt=0, description="T of both softmaxes; the term is multiplied by T^2")
    weight: float = Field(1.0, ge=0, description="weight of the distillation term; 1 in the paper")
    ramp_up_epochs: int = Field(
        80,
        ge=0,
        description="epochs in which distillation gains its weight: 80 in the published scripts, 0 (none) in the paper",
    )


class Gate(nn.Module):
    """softmax(relu(BatchNorm(Linear(pooled map)))): the trunk's map [N, c, h, w] -> weights of the peers [N, K].

    The ReLU keeps every score at 0 or above, so that peers often tie.
    """

    def __init__(self, channels: int, num_peers: int) -> None:
        super().__init__()
        self.linear = nn.Linear(channels, num_peers)
        self.norm = nn.BatchNorm1d(num_peers)

    def forward(self, maps: Tensor) -> Tensor:
        return F.relu(self.norm(self.linear(maps.mean((2, 3))))).softmax(-1)


class ONE(SharedTrunk, Method):
    r"""The branches of one network learn from their own gated ensemble.

    With K branches, logits z_k [N, C], gate g [N, K] on the trunk's map, means over rows and w(e) the ramp-up
    (`losses.functional.ramp_up`),

        z_E = \sum_k g_k z_k
        L = CE(z_E, y) + \sum_k [ CE(z_k, y) + \lambda w(e) T^2 KL(softmax(stop(z_E) / T) || softmax(z_k / T)) ].

    CE(z_E, y) teaches the gate, and through it and the logits all branches and the trunk. It stands once in the
    objective, but every rank computes it: for its own peers' logits and for the gate that gradient is the whole one.
    All stages but the last are shared, and follow the sum of the branches' gradients.
    """

    name = "one"
    Options = ONEOptions
    deployed = "first"
    options: ONEOptions
    one_view: ClassVar[bool] = True

    def __init__(self, options: ONEOptions, peers: Sequence[PeerInfo]) -> None:
        super().__init__(options, peers)
        stages = peers[0].stages
        channels, _ = stages[self.trunk(options, len(stages)) - 1]
        self.gate = Gate(channels, len(peers))

    @classmethod
    def check(cls, options: ONEOptions, num_peers: int) -> None:
        if num_peers < 2:
            raise ValueError("one needs at least 2 peers to make an ensemble of, found 1")

    @classmethod
    def trunk(cls, options: ONEOptions, num_stages: int) -> int:
        return num_stages - 1

    def forward(
        self, residents: Sequence[int], signals: Sequence[Signals], targets: Tensor, progress: Progress
    ) -> Terms:
        options, t = self.options, self.options.temperature
        weight = options.weight * t**2 * ramp_up(progress.epoch, options.ramp_up_epochs)
        gate = self.gate(signals[residents[0]]["trunk"])
        ensemble = torch.einsum("nk,nkc->nc", gate, torch.stack([peer["logits"].float() for peer in signals], 1))

        log_q = tempered_log_softmax(ensemble.detach(), t)
        terms: Terms = {(None, "ce_ensemble"): self.classify(ensemble, targets)}
        for k in residents:
            z = signals[k]["logits"]
            terms[k, "ce"] = self.classify(z, targets)
            terms[k, "kd"] = weight * divergence(tempered_log_softmax(z, t), log_q)
        return terms

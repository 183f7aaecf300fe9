"""Feature Fusion Learning (Kim, Hyun, Chung, Kwak; ICPR 2020, arXiv 1904.09058). FFL-S is one of its sub-networks."""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor, nn

from losses.capabilities import OwnWeightDecay, SharedTrunk, StageTaps
from losses.contract import Method, MethodOptions, PeerInfo, Progress, Signals, Terms
from losses.functional import divergence, ramp_up, tempered_log_softmax


class FFLOptions(MethodOptions):
    """Options of `ffl`."""

    name: Literal["ffl"] = "ffl"
    temperature: float = Field(3.0, gt=0, description="T of all softmaxes; the terms are multiplied by T^2")
    weight: float = Field(1.0, ge=0, description="weight of the distillation terms; 1 in the paper")
    ramp_up_epochs: int = Field(
        80, ge=0, description="epochs in which distillation gains its weight: 80 in the published code; 0: none"
    )
    fusion_weight_decay: float = Field(1e-5, ge=0, description="weight decay of the fusion; 1e-5 in the published code")


class Fusion(nn.Module):
    """The fused classifier: K maps [N, c, h, w] -> logits [N, C].

    Concatenated, 3x3 depthwise convolution, BatchNorm, ReLU, 1x1 convolution K c -> c, BatchNorm, ReLU, average over
    the map, linear.
    """

    def __init__(self, num_peers: int, channels: int, num_classes: int) -> None:
        super().__init__()
        wide = num_peers * channels
        self.layers = nn.Sequential(
            nn.Conv2d(wide, wide, 3, padding=1, groups=wide, bias=False),
            nn.BatchNorm2d(wide),
            nn.ReLU(),
            nn.Conv2d(wide, channels, 1, bias=False),
            nn.BatchNorm2d(channels),
            nn.ReLU(),
            nn.AdaptiveAvgPool2d(1),
            nn.Flatten(),
            nn.Linear(channels, num_classes),
        )

    def forward(self, maps: Sequence[Tensor]) -> Tensor:
        return self.layers(torch.cat(list(maps), 1))


class LastMap(nn.Module):
    """Shows the map of the last stage as `map`, whatever the number of stages."""

    def __init__(self, num_stages: int) -> None:
        super().__init__()
        self._name = f"stage{num_stages}"

    def forward(self, signals: Signals) -> dict[str, Tensor]:
        return {"map": signals[self._name]}


class FFL(SharedTrunk, StageTaps, OwnWeightDecay, Method):
    r"""Sub-networks are fused into a classifier that learns from their mean and teaches each of them.

    With K sub-networks (2 in the paper) on a shared trunk, logits z_k [N, C] and last maps f_k [N, c, h, w], fused
    logits z_F = Fusion(f_1 .. f_K), z_M = 1/K \sum_k z_k, KD(z -> t) = T^2 KL(softmax(t / T) || softmax(z / T)), means
    over rows and w(e) the ramp-up (`losses.functional.ramp_up`),

        L = CE(z_F, y) + \lambda w(e) KD(z_F -> stop(z_M))
            + \sum_k [ CE(z_k, y) + \lambda w(e) KD(z_k -> stop(z_F)) ].

    Nothing stops at f_k: the two terms of z_F reach every sub-network and the trunk. They stand once in the objective,
    but every rank computes them: for its own peers' maps and for the fusion that gradient is the whole one. All stages
    but the last are shared, and follow the sum of the gradients. A peer that is exported is FFL-S.
    """

    name = "ffl"
    Options = FFLOptions
    deployed = "first"
    options: FFLOptions
    signals: ClassVar[tuple[str, ...]] = ("logits", "map")

    def __init__(self, options: FFLOptions, peers: Sequence[PeerInfo]) -> None:
        super().__init__(options, peers)
        channels, _ = peers[0].stages[-1]
        self.fusion = Fusion(len(peers), channels, peers[0].num_classes)

    @classmethod
    def check(cls, options: FFLOptions, num_peers: int) -> None:
        if num_peers < 2:
            raise ValueError("ffl needs at least 2 peers to fuse, found 1")

    @classmethod
    def taps(cls, options: FFLOptions, num_stages: int) -> Sequence[int]:
        return (num_stages,)

    @classmethod
    def trunk(cls, options: FFLOptions, num_stages: int) -> int:
        return num_stages - 1

    def head(self, peer: PeerInfo) -> nn.Module:
        return LastMap(len(peer.stages))

    @classmethod
    def weight_decay(cls, options: FFLOptions) -> float:
        return options.fusion_weight_decay

    def forward(
        self, residents: Sequence[int], signals: Sequence[Signals], targets: Tensor, progress: Progress
    ) -> Terms:
        t = self.options.temperature
        weight = self.options.weight * t**2 * ramp_up(progress.epoch, self.options.ramp_up_epochs)
        fused = self.fusion([peer["map"] for peer in signals])
        mean = torch.stack([peer["logits"].detach().float() for peer in signals]).mean(0)
        log_fused = tempered_log_softmax(fused, t)

        terms: Terms = {
            (None, "ce_fused"): self.classify(fused, targets),
            (None, "kd_fused"): weight * divergence(log_fused, tempered_log_softmax(mean, t)),
        }
        for k in residents:
            z = signals[k]["logits"]
            terms[k, "ce"] = self.classify(z, targets)
            terms[k, "kd"] = weight * divergence(tempered_log_softmax(z, t), log_fused.detach())
        return terms

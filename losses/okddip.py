"""OKDDip, online distillation with diverse peers (Chen, Mei, Wang, Feng, Chen; AAAI 2020, arXiv 1912.00350)."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor, nn

from losses.capabilities import SharedTrunk
from losses.contract import Method, MethodOptions, PeerInfo, Progress, Signals, Terms
from losses.functional import divergence, ramp_up, tempered_log_softmax


class OKDDipOptions(MethodOptions):
    """Options of `okddip`."""

    name: Literal["okddip"] = "okddip"
    form: Literal["branch", "network"] = Field(
        "branch", description="branch: peers and leader share all stages but the last; network: they share nothing"
    )
    mix: Literal["logits", "probabilities"] = Field(
        "logits",
        description="what attention mixes into a peer's target, and what the leader learns the mean of: the published "
        "code has logits, the paper has probabilities at temperature T",
    )
    temperature: float = Field(3.0, gt=0, description="T of all softmaxes; the terms are multiplied by T^2")
    weight: float = Field(1.0, ge=0, description="weight of the distillation terms; 1 in the paper")
    ramp_up_epochs: int = Field(80, ge=0, description="epochs in which distillation gains its weight; 0: none")


class OKDDip(SharedTrunk, Method):
    r"""Peers learn from mixtures of all peers that each chooses by attention, and a leader learns from their mean.

    The last of the K peers is the leader L, the one to deploy; a, b run over the K - 1 others. With logits z [N, C],
    pooled features h [N, D], KD(z -> t) = T^2 KL(softmax(t / T) || softmax(z / T)), means over rows and w(e) the
    ramp-up (`losses.functional.ramp_up`), for each row

        A_ab = softmax_b( (W_q h_a) . (W_k h_b) ),  W_q, W_k: D -> D/8 without bias, shared by all peers
        x_a = \sum_b A_ab z_b
        L = \sum_k CE(z_k, y) + \lambda w(e) [ \sum_a KD(z_a -> x_a) + KD(z_L -> 1/(K-1) \sum_a z_a) ].

    `mix: probabilities` takes softmax(z / T) for z in both targets. As in the published code no target is constant:
    W_q and W_k learn by nothing else, and a peer is pulled towards those that it teaches. So every peer is in every
    distillation term, and every rank computes all of them. The leader's features are not used.
    """

    name = "okddip"
    Options = OKDDipOptions
    deployed = "leader"
    frozen_hindrance = "its attention is learned by all peers' terms together"
    options: OKDDipOptions
    signals: ClassVar[tuple[str, ...]] = ("logits", "features")

    def __init__(self, options: OKDDipOptions, peers: Sequence[PeerInfo]) -> None:
        super().__init__(options, peers)
        widths = [peer.num_features for peer in peers[:-1]]
        if len(set(widths)) > 1:
            raise ValueError(
                f"okddip: all peers but the leader share one attention, found features of widths {widths}; "
                "expected networks with features of one width"
            )
        narrow = max(widths[0] // 8, 1)
        self.query = nn.Linear(widths[0], narrow, bias=False)
        self.key = nn.Linear(widths[0], narrow, bias=False)

    @classmethod
    def check(cls, options: OKDDipOptions, num_peers: int) -> None:
        if num_peers < 3:
            raise ValueError(f"okddip needs at least 2 peers and the leader, which is the last one; found {num_peers}")

    @classmethod
    def trunk(cls, options: OKDDipOptions, num_stages: int) -> int | None:
        return num_stages - 1 if options.form == "branch" else None

    def forward(
        self, residents: Sequence[int], signals: Sequence[Signals], targets: Tensor, progress: Progress
    ) -> Terms:
        t = self.options.temperature
        weight = self.options.weight * t**2 * ramp_up(progress.epoch, self.options.ramp_up_epochs)
        *peers, leader = (peer["logits"].float() for peer in signals)
        logits = torch.stack(peers, 1)
        features = torch.stack([peer["features"].float() for peer in signals[:-1]], 1)
        log_attention = (self.query(features) @ self.key(features).mT).log_softmax(-1)
        log_p = tempered_log_softmax(logits, t)
        if self.options.mix == "logits":
            log_x = tempered_log_softmax(log_attention.exp() @ logits, t)
            log_mean = tempered_log_softmax(logits.mean(1), t)
        else:
            log_x = _log_of_mixtures(log_attention.exp(), log_p)
            log_mean = log_p.logsumexp(1) - math.log(len(peers))

        terms: Terms = {(k, "ce"): self.classify(signals[k]["logits"], targets) for k in residents}
        # Means over rows, and the sum over peers.
        terms[None, "kd"] = weight * divergence(log_p, log_x)
        terms[None, "kd_leader"] = weight * divergence(tempered_log_softmax(leader, t), log_mean)
        return terms


def _log_of_mixtures(attention: Tensor, log_p: Tensor) -> Tensor:
    r"""log \sum_b A_ab p_b, [N, K, K] and [N, K, C] -> [N, K, C]: a batched product, K^2 C numbers are nowhere at once.

    What is below float32's least number, a peer's probability or its share, is taken for that: as a target it weighs
    nothing.
    """
    largest = log_p.detach().amax(1, keepdim=True)
    mixed = attention @ (log_p - largest).exp()
    return mixed.clamp_min(torch.finfo(mixed.dtype).tiny).log() + largest

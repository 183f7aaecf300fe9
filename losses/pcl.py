"""Peer Collaborative Learning for Online Knowledge Distillation (Wu, Gong; AAAI 2021, arXiv 2006.04147)."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, Literal

import torch
from pydantic import Field
from torch import Tensor, nn

from losses.capabilities import SharedTrunk, Teachers
from losses.contract import Method, MethodOptions, PeerInfo, Progress, Signals, Terms
from losses.functional import divergence, mixtures, others, ramp_up, tempered_log_softmax


class PCLOptions(MethodOptions):
    """Options of `pcl`."""

    name: Literal["pcl"] = "pcl"
    temperature: float = Field(3.0, gt=0, description="T of all distillation terms, which are multiplied by T^2")
    weight: float = Field(1.0, ge=0, description="lambda, what the ramp-up of the distillation terms leads to")
    ramp_up: Literal["paper", "repository", "none"] = Field(
        "paper",
        description="`paper`: over ramp_up_epochs; `repository`: the official code's, in which a slip leaves "
        "distillation on for epochs 0 to 2, off up to epoch 80, and on from there; `none`: 1 from the start",
    )
    ramp_up_epochs: int = Field(80, ge=1, description="alpha, the length of the ramp-up of the paper")
    max_decay: float = Field(
        0.999, ge=0, lt=1, description="largest decay of the teachers, a mean of all weights so far until then"
    )


class PCL(Teachers, SharedTrunk, Method):
    r"""Branches of one network learn from their ensemble and from moving averages of each other.

    With m peers on a trunk that they share, each on an augmentation x_j of the image that is its own
    (`data.views: per_peer`), logits z_j [N, C] and pooled features h_j [N, D],

        z_E = W_E [h_1; ...; h_m] + b_E
        L   = CE(z_E, y) + \sum_j [ CE(z_j, y) + w(e) KD(z_j, z_E) + w(e) / (m-1) \sum_{l != j} KD(z_j, z'_l) ]
        KD(z, t) = T^2 KL(softmax(t / T) || softmax(z / T)),   t constant

    where CE and KL are means over rows. CE(z_E, y) teaches W_E, every branch and the trunk. z'_l are the logits of peer
    l's teacher on x_l: after update number g, counted from 0, its parameters become phi theta' + (1 - phi) theta with
    phi(g) = min(1 - 1 / (g + 1), 0.999), and its BatchNorm is its own, in training mode.

    w(e) = \lambda exp(-5 (1 - e / alpha)^2) up to epoch e = alpha, and \lambda from there on. The official code divides
    by lambda, 1, in the place of alpha: exp(-5 (1 - e)^2) up to epoch 80, which is 1 in epoch 1 and below 1e-8 from
    epoch 3 on, and then 1. `ramp_up: repository` does the same.

    Deviations from the official code: all weights of a branch are drawn anew, where it leaves the classifiers of all
    branches equal; a teacher begins as a copy of its peer, not as another random network (which matters in the first
    step alone); the BatchNorm statistics of the peers' trunk move once a step, by the mean of the views, where it moves
    them with one view after another; and each teacher has the trunk for itself, so that the statistics of its trunk are
    of its own view. The trunk's parameters are the same in all teachers.
    """

    name = "pcl"
    Options = PCLOptions
    options: PCLOptions
    signals = ("logits", "features", "teacher")
    private = ("logits",)
    deployed = "ema"

    def __init__(self, options: PCLOptions, peers: Sequence[PeerInfo]) -> None:
        super().__init__(options, peers)
        self.ensemble = nn.Linear(sum(peer.num_features for peer in peers), peers[0].num_classes)

    @classmethod
    def check(cls, options: PCLOptions, num_peers: int) -> None:
        if num_peers < 2:
            raise ValueError("pcl needs at least 2 peers to teach each other, found 1")

    @classmethod
    def trunk(cls, options: PCLOptions, num_stages: int) -> int | None:
        return num_stages - 1

    @classmethod
    def teacher_decay(cls, options: PCLOptions, step: int) -> float:
        return min(1 - 1 / (step + 1), options.max_decay)

    def forward(
        self, residents: Sequence[int], signals: Sequence[Signals], targets: Tensor, progress: Progress
    ) -> Terms:
        t = self.options.temperature
        weight = self.options.weight * t**2 * self._ramp_up(progress.epoch)
        ensemble = self.ensemble(torch.cat([peer["features"] for peer in signals], dim=1))
        log_ensemble = tempered_log_softmax(ensemble.detach(), t)
        log_teachers = [tempered_log_softmax(peer["teacher"].detach(), t) for peer in signals]
        taught = mixtures(log_teachers, others(self.num_peers, log_ensemble, mean=True))

        terms: Terms = {(None, "ce_ensemble"): self.classify(ensemble, targets)}
        for j in residents:
            z = signals[j]["logits"]
            log_p = tempered_log_softmax(z, t)
            terms[j, "ce"] = self.classify(z, targets, log_p=log_p if t == 1 else None)
            terms[j, "kd_ensemble"] = weight * divergence(log_p, log_ensemble)
            terms[j, "kd_teachers"] = weight * taught.kl(j, log_p)
        return terms

    def _ramp_up(self, epoch: int | Tensor) -> Any:
        if self.options.ramp_up == "none":
            return 1.0
        if self.options.ramp_up == "repository":
            if isinstance(epoch, Tensor):
                return torch.where(epoch <= 80, torch.exp(-5.0 * (1 - epoch) ** 2), 1.0)
            return math.exp(-5 * (1 - epoch) ** 2) if epoch <= 80 else 1.0
        return ramp_up(epoch, self.options.ramp_up_epochs)

"""Deep Mutual Learning (Zhang, Xiang, Hospedales, Lu; CVPR 2018, arXiv 1706.00384)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch
from pydantic import Field
from torch import Tensor

from losses.capabilities import Turns
from losses.contract import Method, MethodOptions, PeerInfo, Progress, Signals, Terms
from losses.functional import cross_term, mixtures, others, ramp_up, tempered_log_softmax


class DMLOptions(MethodOptions):
    """Options of `dml`."""

    name: Literal["dml"] = "dml"
    combine: Literal["mean", "sum", "ensemble"] = Field(
        "mean",
        description="how the K-1 other peers teach: `mean` of their KL terms (the paper), `sum` (the official code), "
        "or one KL term from the `ensemble` of their probabilities (DML_e; same gradients as `mean`)",
    )
    order: Literal["simultaneous", "sequential"] = Field(
        "simultaneous",
        description="`sequential` is the paper's Algorithm 1: peers are updated one after another, each against "
        "predictions that earlier peers recompute after their update (their BatchNorm statistics follow a batch once); "
        "K exchanges a step and no parallelism",
    )
    temperature: float = Field(1.0, gt=0, description="T of both softmaxes; the term is multiplied by T^2")
    weight: float = Field(1.0, ge=0, description="weight of the KL term; 1 in the paper")
    weights: list[list[float]] | None = Field(
        None,
        description="K rows of K numbers: weights[k][j], times `weight`, is how much peer k learns from peer j, in "
        "place of 1/(K-1); 0 on the diagonal; null: all alike, as `combine` says",
    )
    ramp: int = Field(
        0, ge=0, description="epochs over which the weight of the KL term rises, as exp(-5 (1 - epoch/ramp)^2); 0: none"
    )


class DML(Turns, Method):
    r"""Every peer matches the class probabilities of the others.

    With K peers, logits z_k [N, C], p_k = softmax(z_k / T) and the others' p_j constant,

        L_k = CE(z_k, y) + \lambda T^2 / (K-1) \sum_{j != k} KL(p_j || p_k)

    where CE and KL are means over rows. Since KL is linear in p_j but for an entropy, only q = mean_{j != k} p_j enters
    the gradient: dL_k/dz_k = [softmax(z_k) - y + \lambda T (p_k - q)] / N.

    Not in the paper: weights w_kj in place of 1 / (K-1), so that a weak peer need not drag a strong one down, and a
    ramp of \lambda.
    """

    name = "dml"
    Options = DMLOptions
    options: DMLOptions
    weights: Tensor

    def __init__(self, options: DMLOptions, peers: Sequence[PeerInfo]) -> None:
        super().__init__(options, peers)
        if options.weights is not None:
            self.register_buffer("weights", torch.tensor(options.weights), persistent=False)

    @classmethod
    def check(cls, options: DMLOptions, num_peers: int) -> None:
        if num_peers < 2:
            raise ValueError("dml needs at least 2 peers to teach each other, found 1")
        if options.weights is None:
            return
        rows = options.weights
        if len(rows) != num_peers or any(len(row) != num_peers for row in rows):
            raise ValueError(f"weights: expected {num_peers} rows of {num_peers} numbers, found {rows}")
        if any(w < 0 for row in rows for w in row) or any(row[k] for k, row in enumerate(rows)):
            raise ValueError(f"weights: expected numbers from 0, and 0 on the diagonal, found {rows}")
        if options.combine != "mean":
            raise ValueError(f"combine = {options.combine}: weights say how peers are combined; expected mean")

    @classmethod
    def turns(cls, options: DMLOptions, num_peers: int) -> Sequence[Sequence[int]]:
        if options.order == "sequential":
            return [(k,) for k in range(num_peers)]
        return [range(num_peers)]

    def forward(
        self, residents: Sequence[int], signals: Sequence[Signals], targets: Tensor, progress: Progress
    ) -> Terms:
        options, t = self.options, self.options.temperature
        scale = options.weight * t**2 * ramp_up(progress.epoch, options.ramp)
        log_p = [tempered_log_softmax(peer["logits"], t) for peer in signals]
        taught = mixtures(log_p, self._weights(log_p[0]))

        terms: Terms = {}
        for k in residents:
            terms[k, "ce"] = self.classify(signals[k]["logits"], targets, log_p=log_p[k] if t == 1 else None)
            if options.combine == "ensemble":
                q = taught.q[k]
                terms[k, "kl"] = scale * (torch.special.xlogy(q, q).sum(-1).mean() - cross_term(q, log_p[k]))
            else:
                terms[k, "kl"] = scale * taught.kl(k, log_p[k])
        return terms

    def _weights(self, like: Tensor) -> Tensor:
        """w_kj [K, K]."""
        if self.options.weights is not None:
            return self.weights
        return others(self.num_peers, like, mean=self.options.combine != "sum")

"""Mutual Contrastive Learning for visual representation learning (Yang, An, Cai, Xu; AAAI 2022, arXiv 2104.12565)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch
from pydantic import Field
from torch import Tensor, nn

from losses.capabilities import ActsAfterStep, AfterStep, AllRows, MakeTable, SharedTrunk, Tables
from losses.contract import Method, PeerInfo, Progress, Signals, Terms
from losses.contrast import ContrastiveOptions, Pair, PairRows, rows_in_batch, rows_in_memory, totals
from losses.functional import divergence, tempered_log_softmax
from losses.memory import Memory


class MCLOptions(ContrastiveOptions):
    """Options of `mcl`."""

    name: Literal["mcl"] = "mcl"
    logit_distill: Literal["none", "all", "last"] = Field(
        "none",
        description="whether all peers, or the last one alone, also match the mean of all logits, with weight 1; the "
        "published code has `all` for two peers and `last` for more",
    )
    shared_stages: int = Field(
        0, ge=0, description="stages that all peers share; 1 on CIFAR and 2 on ImageNet in the papers' cohorts of four"
    )


class Contrastive(AllRows, Tables, ActsAfterStep, Method):
    """What MCL and L-MCL have in common: where candidates come from, and the memory of embeddings."""

    options: ContrastiveOptions
    memory: Memory
    banks_differ_by_rank = False

    def __init__(self, options: ContrastiveOptions, peers: Sequence[PeerInfo]) -> None:
        super().__init__(options, peers)
        # Drawn with the method's initial weights, so a function of the run's seed; on the CPU even where a method is
        # only tried, without memory for its weights.
        first, second = torch.randint(2**32, (2,), device="cpu").tolist()
        self._key = first, second
        # Banks are constant, so that peers matter to each other as teachers only.
        self.exchange = "detached" if options.negatives == "memory" else "differentiable"
        self.everywhere = () if options.negatives == "batch" else ("embeddings",)

    @classmethod
    def needs_classes(cls, options: ContrastiveOptions) -> bool:
        return True

    @classmethod
    def compile_hindrance(cls, options: ContrastiveOptions) -> str | None:
        if options.negatives != "memory":
            return None
        return "method.negatives = memory draws from banks, by the number of the step"

    @classmethod
    def check(cls, options: ContrastiveOptions, num_peers: int) -> None:
        if num_peers < 2:
            raise ValueError(f"{cls.name} needs at least 2 peers to teach each other, found 1")

    def prepare(self, classes: Tensor, make_table: MakeTable) -> None:
        if self.options.negatives == "memory":
            self.memory = Memory(
                self.options, self.num_peers, classes, make_table, self._key, differs_by_rank=self.banks_differ_by_rank
            )

    def rows(
        self,
        residents: Sequence[int],
        signals: Sequence[Signals],
        targets: Tensor,
        progress: Progress,
        *,
        own_bank: bool = True,
    ) -> dict[Pair, PairRows]:
        """The pair rows of the residents' anchors, from signals `embeddings` [N, S_k, d] of every peer."""
        anchors = [peer["embeddings"].transpose(0, 1) for peer in signals]
        if self.options.negatives == "memory":
            ids = signals[0]["all_ids"][: len(targets)]
            products = self.memory.products(ids, targets, progress.step)
            return rows_in_memory(residents, anchors, products, self.options.positives, self.options, own_bank=own_bank)
        if self.options.negatives == "batch":
            return rows_in_batch(residents, anchors, anchors, targets, self.options)
        candidates = [peer["all_embeddings"].transpose(0, 1) for peer in signals]
        return rows_in_batch(residents, anchors, candidates, signals[0]["all_targets"], self.options)

    def after_step(self, after: AfterStep) -> None:
        if self.options.negatives == "memory":
            for signals in after.everywhere:
                last = [peer["all_embeddings"][:, -1] for peer in signals]
                self.memory.update(signals[0]["all_ids"], last, after.skipped)


class MCL(SharedTrunk, Contrastive):
    r"""Peers contrast their images with each other's, and match each other's contrastive distributions.

    With K peers, an embedding of each image e_k [N, d] of unit length from a head on the pooled features, and
    VCL_k, ICL_kj, SoftVCL_kj, SoftICL_kj as in `losses.contrast`,

        L = \sum_k [ CE(z_k, y) + \alpha VCL_k ]
            + \sum_k \sum_{j != k} [ \gamma SoftVCL_kj + \beta ICL_kj + \lambda SoftICL_kj ]

    where an image's anchor excludes that image among the candidates, of its own and of other peers' embeddings, unless
    the candidates come from memory, where the own image is a positive of ICL. An anchor without positives counts 0; all
    means are over all N rows. With `logit_distill`, the chosen peers also match the mean \bar{z} of all logits, a
    constant: + T^2 KL(softmax(\bar{z} / T) || softmax(z_k / T)).

    From memory, peer k's bank [n, d] holds an embedding of each training image; after each step the rows of its images
    move, m <- normalise(\mu m + (1 - \mu) e_k).

    Deviations from the published code: logs of sums of exponentials are taken safely; `negatives: global` takes its
    candidates from all ranks, which is the same on one; heads and banks are the same on all ranks, where the published
    code averages no gradient of the heads; its ensemble teacher carries a gradient on ImageNet, here it is constant.
    """

    name = "mcl"
    Options = MCLOptions
    options: MCLOptions
    signals = ("logits", "embeddings")
    deployed = "best"

    def __init__(self, options: MCLOptions, peers: Sequence[PeerInfo]) -> None:
        super().__init__(options, peers)
        self.private = ("logits",) if options.logit_distill == "none" else ()

    @classmethod
    def trunk(cls, options: MCLOptions, num_stages: int) -> int | None:
        return options.shared_stages or None

    def head(self, peer: PeerInfo) -> nn.Module:
        return _Embedding(peer.projection(peer.num_features, self.options.width))

    def forward(
        self, residents: Sequence[int], signals: Sequence[Signals], targets: Tensor, progress: Progress
    ) -> Terms:
        rows = self.rows(residents, signals, targets, progress)
        terms: Terms = {(k, "ce"): self.classify(signals[k]["logits"], targets) for k in residents}
        terms |= totals(rows, {}, self.options, vcl_counts=1 / (self.num_peers - 1))
        students = {"none": [], "all": residents, "last": [self.num_peers - 1]}[self.options.logit_distill]
        if students:
            t = self.options.temperature
            log_q = tempered_log_softmax(torch.stack([peer["logits"].detach() for peer in signals]).mean(0), t)
            for k in set(students) & set(residents):
                terms[k, "kd"] = t**2 * divergence(tempered_log_softmax(signals[k]["logits"], t), log_q)
        return terms


class _Embedding(nn.Module):
    """{`features` [N, D]} -> `embeddings` [N, 1, d]."""

    def __init__(self, projection: nn.Module) -> None:
        super().__init__()
        self.projection = projection

    def forward(self, signals: Signals) -> dict[str, Tensor]:
        return {"embeddings": self.projection(signals["features"]).unsqueeze(1)}

"""Codistillation: distillation from stale copies of the other peers.

Source: Anil, Pereyra, Passos, Ormandi, Dahl, Hinton, "Large scale distributed neural network training through online
distillation" (ICLR 2018, arXiv 1804.03235).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Literal

import torch
from pydantic import Field
from torch import Tensor, nn

from losses.capabilities import AfterStep, LooksAtImages, MeetsAsJobs
from losses.contract import Method, MethodOptions, PeerInfo, Progress, Signals, Terms
from losses.functional import cross_term, fill, flat, tempered_log_softmax


class CodistillationOptions(MethodOptions):
    """Options of `codistillation`."""

    name: Literal["codistillation"] = "codistillation"
    interval: int = Field(50, ge=1, description="steps between two exchanges of weights")
    burn_in: int = Field(
        0, ge=0, description="steps of cross-entropy alone; with their last one the first weights are exchanged"
    )
    weight: float = Field(1.0, ge=0, description="weight of the KL term")
    wire: Literal["float32", "bf16"] = Field(
        "float32", description="number format of the weights under way, and so of the copies' values"
    )


class Codistillation(LooksAtImages, MeetsAsJobs, Method):
    r"""Every peer matches the class probabilities of stale copies of the others, which are computed where it lives.

    With peer k's logits z_k [N, C], p_k = softmax(z_k), \hat{p}_j the probabilities that a copy of peer j gives for the
    images that peer k sees, and O_k the peers j != k of which there is a copy where k lives,

        L_k = CE(z_k, y) + \lambda KL(1/|O_k| \sum_{j in O_k} \hat{p}_j || p_k)

    where CE and KL are means over rows; with no copy, O_k = {}, the KL term is 0. Copies are taken after step
    `burn_in`, or after step `interval` where that is 0, and every `interval` steps from there on.

    Copies are in evaluation mode: they use the running statistics of BatchNorm, which are exchanged with the weights
    (the mean over all replicas of a peer), and no dropout. A copy's answer then depends on the image alone, not on the
    other rows of the batch or on how rows are cut over ranks, and stays fixed between two exchanges, as that of the
    checkpoint that it stands for.

    What it saves: nothing but weights is exchanged between peers. Every `interval` steps one collective takes 4 bytes,
    in bf16 2, for each parameter and statistic of a peer, after an average of the statistics over its replicas: for
    ResNet-50 in bf16 51 MB, which is 0.1 MB a step with an interval of 500. The logits of 128 rows of 1000 classes are
    0.5 MB a step. What it costs: every rank keeps copies of all K networks (102 MB each for ResNet-50), which are saved
    with the run, and computes K - 1 forward passes more for each resident's images (colocated peers on shared views: K
    for all together). While weights are under way, a rank also holds those of all K peers in one buffer. All peers see
    the same data here; the paper lets them see parts of their own.

    Peers of one gang exchange by a collective: from the first exchange on all copies are there, at most `interval`
    steps old. A peer that is late is waited for, and one that is gone ends the gang, to go on from its checkpoint.
    Peers that are jobs of their own (`placement.kind: jobs`), as in the paper, leave their weights in a folder and take
    those that lie there, of whatever step: nobody waits, and of a peer that is late or gone the last copy stays in use.
    A job writes one file, and reads those of K - 1 others, where the gang has its collective.
    """

    name = "codistillation"
    Options = CodistillationOptions
    options: CodistillationOptions
    private = ("logits", "stale")
    exchange = "none"

    def __init__(self, options: CodistillationOptions, peers: Sequence[PeerInfo]) -> None:
        super().__init__(options, peers)
        # Of all peers on every rank: then they are saved once, and a run goes on in any placement.
        self.copies = nn.ModuleList([peer.network() for peer in peers])
        self.copies.requires_grad_(False).eval()
        self._taken = [False] * len(peers)
        self._first = options.burn_in or options.interval

    def get_extra_state(self) -> Tensor:
        """Which copies are copies of a peer, and not yet random: bool [K]. Not a buffer, as the host asks each step."""
        return torch.tensor(self._taken)

    def set_extra_state(self, state: Tensor) -> None:
        self._taken = state.tolist()

    @classmethod
    def check(cls, options: CodistillationOptions, num_peers: int) -> None:
        if num_peers < 2:
            raise ValueError("codistillation needs at least 2 peers to teach each other, found 1")

    def look(self, images: Mapping[int, Tensor], progress: Progress) -> Mapping[int, Signals]:
        """`stale` [N, C]: the mean of the probabilities that the copies of the other peers give."""
        answers: dict[tuple[int, int], Tensor] = {}
        seen: dict[int, Signals] = {}
        for k, own in images.items():
            others = [j for j in range(self.num_peers) if j != k and self._taken[j]]
            for j in others:
                if (j, id(own)) not in answers:
                    answers[j, id(own)] = tempered_log_softmax(self.copies[j](own), 1.0).exp()
            if others:
                seen[k] = {"stale": torch.stack([answers[j, id(own)] for j in others]).mean(0)}
        return seen

    def forward(
        self, residents: Sequence[int], signals: Sequence[Signals], targets: Tensor, progress: Progress
    ) -> Terms:
        terms: Terms = {}
        for k in residents:
            logits, q = signals[k]["logits"], signals[k].get("stale")
            log_p = tempered_log_softmax(logits, 1.0)
            terms[k, "ce"] = self.classify(logits, targets, log_p=log_p)
            terms[k, "kl"] = logits.new_zeros(())
            if q is not None:
                own = torch.special.xlogy(q, q).sum(-1).mean()
                terms[k, "kl"] = self.options.weight * (own - cross_term(q, log_p))
        return terms

    @torch.no_grad()
    def after_step(self, after: AfterStep) -> None:
        # Of a skipped step too: the weights are then those of the step before, which are as good.
        done = after.progress.step + 1
        if done < self._first or (done - self._first) % self.options.interval:
            return
        after.average_buffers()
        wire = torch.bfloat16 if self.options.wire == "bf16" else torch.float32
        # Rounded before they are sent, so that colocated peers take the same copies.
        own = {k: flat(_state(peer.get_submodule("network"))).to(wire).float() for k, peer in after.residents.items()}
        everyones = after.exchange({k: {"weights": row} for k, row in own.items()}, wire=wire)
        for j, peer in enumerate(everyones):
            if peer:
                fill(_state(self.copies[j]), peer["weights"])
                self._taken[j] = True

    def shapes_shown(self) -> Sequence[Mapping[str, tuple[int, ...]]]:
        return [{"weights": (sum(x.numel() for x in _state(copy)),)} for copy in self.copies]

    @torch.no_grad()
    def answers(self, peer: int, shown: Signals, images: Tensor) -> Tensor:
        copy = self.copies[peer]
        state = _state(copy)
        before = flat(state)
        fill(state, shown["weights"])
        try:
            return copy(images)
        finally:
            fill(state, before)


def _state(network: nn.Module) -> list[Tensor]:
    """Parameters and statistics; counters, which evaluation mode does not look at, stay behind."""
    return [*network.parameters(), *(b for b in network.buffers() if b.is_floating_point())]

"""Dense Cross-layer Mutual-distillation (Yao, Sun; ECCV 2020, arXiv 2008.07816)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor, nn

from losses.capabilities import StageTaps
from losses.contract import Method, MethodOptions, PeerInfo, Progress, Signals, Terms
from losses.functional import cross_term, mixed, others, tempered_log_softmax

HEADS = ("ep1", "ep2", "logits")
"""The classifiers of a peer: after its last stage but two, after its last but one, and its own."""

LOGARITHMS = tuple(f"log_{name}" for name in HEADS)
"""What each says, log softmax: taken once, for what is sent and for the objective."""


class DCMOptions(MethodOptions):
    """`dcm` has no options: all weights and temperatures are 1."""

    name: Literal["dcm"] = "dcm"


class DCM(StageTaps, Method):
    r"""Every classifier of a peer, early ones too, matches every classifier of the other peers.

    A peer of S stages has auxiliary classifiers after stages S-2 and S-1, which are left behind at export. With their
    logits and the peer's own z_{k,h} [N, C], h = 1, 2, 3, p_{k,h} = softmax(z_{k,h}) and the others' p constant,

        L_k = \sum_h CE(z_{k,h}, y) + \sum_{j != k} \sum_{h,h'} KL(p_{j,h'} || p_{k,h})

    where CE and KL are means over rows. The paper has K = 2: 6 CE and 18 KL terms. For K > 2 this is the same sum over
    all ordered pairs of peers, so that the weight of the KL terms against CE grows with K - 1.

    What others must know of peer j is s_j = \sum_h' p_{j,h'} alone, since

        \sum_{h,h'} KL(p_{j,h'} || p_{k,h}) = 3 \sum_{h'} \sum_c p_{j,h'} log p_{j,h'} - \sum_h \sum_c s_j log p_{k,h}

    and the first sum, a constant, has no gradient: dL_k/dz_{k,h} = [p_{k,h} - y + \sum_{j != k} (3 p_{k,h} - s_j)] / N.
    The constant is sent along, a number a row, so that the terms are the KL itself: N (C + 1) numbers a peer, a third
    of its logits. (The official code adds 1e-8 to all probabilities; here the logarithms are exact. Sent as bf16, the
    probabilities keep 2 to 3 digits, and so does the constant: the value is then off by up to about 0.1.)

    Deviation from the official code: the classifiers of Wide ResNets begin as all networks here do (convolutions by
    fan-out, BatchNorm weights 1, a linear layer of PyTorch's), where it draws convolutions and linear layers by fan-in
    and BatchNorm weights uniformly from [0, 1].
    """

    name = "dcm"
    Options = DCMOptions
    signals = (*HEADS, *LOGARITHMS, "probabilities", "negentropy")
    private = (*HEADS, *LOGARITHMS)

    @classmethod
    def check(cls, options: DCMOptions, num_peers: int) -> None:
        if num_peers < 2:
            raise ValueError("dcm needs at least 2 peers to teach each other, found 1")

    @classmethod
    def taps(cls, options: DCMOptions, num_stages: int) -> Sequence[int]:
        if num_stages < 3:
            raise ValueError(f"dcm has classifiers after the two stages before the last, found {num_stages} stages")
        return num_stages - 2, num_stages - 1

    def head(self, peer: PeerInfo) -> nn.Module:
        return _EarlyClassifiers(peer)

    def forward(
        self, residents: Sequence[int], signals: Sequence[Signals], targets: Tensor, progress: Progress
    ) -> Terms:
        shown = torch.stack([peer["probabilities"].detach() for peer in signals])
        weights = others(self.num_peers, shown)
        theirs = mixed(weights, shown)
        negentropy = weights @ torch.stack([peer["negentropy"].detach().mean() for peer in signals])
        terms: Terms = {}
        for k in residents:
            mine = signals[k]
            for name, term in (("logits", "ce"), ("ep1", "ce_ep1"), ("ep2", "ce_ep2")):
                terms[k, term] = self.classify(mine[name], targets, log_p=mine[f"log_{name}"])
            log_p = torch.stack([mine[name] for name in LOGARITHMS]).sum(0)
            terms[k, "kl"] = len(HEADS) * negentropy[k] - cross_term(theirs[k], log_p)
        return terms


class _EarlyClassifiers(nn.Module):
    """{`logits`, `stage` S-2, `stage` S-1} -> logits `ep1`, `ep2` [N, C], the log probabilities `log_ep1`, `log_ep2`,
    `log_logits` of all three classifiers, `probabilities` [N, C], the sum of theirs, and `negentropy` [N, 1], too."""

    def __init__(self, peer: PeerInfo) -> None:
        super().__init__()
        last = len(peer.stages)
        self._stages = last - 2, last - 1
        self.ep1, self.ep2 = (peer.auxiliary(stage, "dcm") for stage in self._stages)

    def forward(self, signals: Signals) -> dict[str, Tensor]:
        early, late = (signals[f"stage{stage}"] for stage in self._stages)
        logits = {"ep1": self.ep1(early)["logits"], "ep2": self.ep2(late)["logits"]}
        log_p = [tempered_log_softmax(x, 1.0) for x in (*logits.values(), signals["logits"])]
        with torch.no_grad():
            p = [x.exp() for x in log_p]
            negentropy = torch.stack([q * x for q, x in zip(p, log_p, strict=True)]).sum((0, 2)).unsqueeze(1)
            total = torch.stack(p).sum(0)
        return {**logits, **dict(zip(LOGARITHMS, log_p, strict=True)), "probabilities": total, "negentropy": negentropy}

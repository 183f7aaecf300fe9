"""Online Knowledge Distillation via Collaborative Learning (Guo, Wang, Wu, Yu, Liang, Hu, Luo; CVPR 2020)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor

from losses.capabilities import HeldOutSurveys
from losses.contract import Method, MethodOptions, PeerInfo, Progress, Signals, Terms
from losses.functional import divergence, tempered_log_softmax


class KDCLOptions(MethodOptions):
    """Options of `kdcl`."""

    name: Literal["kdcl"] = "kdcl"
    ensemble: Literal["naive", "linear", "minlogit", "general", "mean"] = Field(
        "minlogit",
        description="how the peers' logits make the teacher: `naive`, those of the peer that is best on the image; "
        "`linear`, the convex combination that is best on the image; `minlogit`, the least margin of each class; "
        "`general`, one combination for an epoch, from images held out of the training data (data.held_out); `mean`, "
        "as in the official code",
    )
    temperature: float = Field(2.0, gt=0, description="T of both softmaxes; the term is multiplied by T^2")
    weight: float = Field(1.0, ge=0, description="lambda, weight of the distillation term; 0.5 in the official code")
    ce_weight: float = Field(1.0, ge=0, description="weight of the cross-entropy; 0.5 in the official code")


class KDCL(HeldOutSurveys, Method):
    r"""Every peer matches one ensemble of the logits of all peers, whatever their architectures.

    With K peers, each on its own augmentation x_i of the image (`data.views: per_peer`), and logits z_i [N, C],

        L = \sum_i [ CE(z_i, y) + \lambda T^2 KL(softmax(z_t / T) || softmax(z_i / T)) ],   z_t constant

    where CE and KL are means over rows, and for each row with class c

        naive     z_t = z_k, k = argmin_i CE(z_i, c)
        linear    z_t = \sum_i a_i z_i, a = argmin CE(\sum_i a_i z_i, c) over a >= 0, \sum_i a_i = 1; see `best_mixture`
        minlogit  z_t[j] = min_i (z_i[j] - z_i[c]), so that CE(z_t, c) <= min_i CE(z_i, c)
        general   z_t = \sum_i w_i z_i, w = C^-1 1 / (1' C^-1 1) with C_ij = 1/M \sum_k <f_i(x_k) - t_k, f_j(x_k) - t_k>
                  over M held-out images, f = softmax(z), t one-hot; anew before each epoch, equal weights in the first
        mean      z_t = 1/K \sum_i z_i

    The paper does not state T beyond doubt; 2 is what most say of it. The official code has the mean of logits, T = 4
    and 0.5 CE + 0.5 KD.
    """

    name = "kdcl"
    Options = KDCLOptions
    options: KDCLOptions
    mixture: Tensor

    def __init__(self, options: KDCLOptions, peers: Sequence[PeerInfo]) -> None:
        super().__init__(options, peers)
        if options.ensemble == "general":
            self.register_buffer("mixture", torch.full((len(peers),), 1 / len(peers)))

    @classmethod
    def check(cls, options: KDCLOptions, num_peers: int) -> None:
        if num_peers < 2:
            raise ValueError("kdcl needs at least 2 peers to teach each other, found 1")

    @classmethod
    def needs_classes(cls, options: KDCLOptions) -> bool:
        return options.ensemble == "minlogit"  # whose margins are those to the class

    @classmethod
    def compile_hindrance(cls, options: KDCLOptions) -> str | None:
        if options.ensemble != "linear":
            return None
        return f"method.ensemble = linear finds its mixtures in {_ROUNDS} rounds, which would be compiled one by one"

    def forward(
        self, residents: Sequence[int], signals: Sequence[Signals], targets: Tensor, progress: Progress
    ) -> Terms:
        options, t = self.options, self.options.temperature
        with torch.no_grad():
            teacher = self._ensemble(torch.stack([peer["logits"].float() for peer in signals]), targets)
            log_q = tempered_log_softmax(teacher, t)
        terms: Terms = {}
        for k in residents:
            z = signals[k]["logits"]
            log_p = tempered_log_softmax(z, t)
            terms[k, "ce"] = options.ce_weight * self.classify(z, targets, log_p=log_p if t == 1 else None)
            terms[k, "kd"] = options.weight * t**2 * divergence(log_p, log_q)
        return terms

    def _ensemble(self, logits: Tensor, targets: Tensor) -> Tensor:
        if self.options.ensemble == "mean":
            return logits.mean(0)
        if self.options.ensemble == "general":
            return torch.einsum("k,knc->nc", self.mixture, logits)
        if self.options.ensemble == "minlogit":
            return _margins(logits, targets).amin(0)
        if self.options.ensemble == "linear":
            return torch.einsum("kn,knc->nc", best_mixture(logits, targets).float(), logits)
        entropies = torch.stack([F.cross_entropy(z, targets, reduction="none") for z in logits])
        return logits.gather(0, entropies.argmin(0).expand(1, logits.shape[2], -1).mT)[0]

    @classmethod
    def held_out(cls, options: KDCLOptions) -> bool:
        return options.ensemble == "general"

    def survey(self, signals: Sequence[Signals], targets: Tensor) -> Tensor:
        """The sum over rows of <f_i - t, f_j - t>, float64 [K, K]."""
        logits = torch.stack([peer["logits"] for peer in signals]).double()
        errors = logits.softmax(-1) - F.one_hot(targets, logits.shape[-1])
        return torch.einsum("inc,jnc->ij", errors, errors)

    def begin_epoch(self, surveyed: Tensor) -> None:
        """w = C^-1 1 / (1' C^-1 1). Where peers are equal, C is singular and they share their weight."""
        ones = torch.ones(self.num_peers, dtype=torch.float64, device=surveyed.device)
        w = torch.linalg.pinv(surveyed, hermitian=True) @ ones
        self.mixture.copy_(w / w.sum())


def _margins(logits: Tensor, targets: Tensor) -> Tensor:
    """z[j] - z[c] of each row, c its class; z[j] - <y, z> where targets are probabilities y. logits [K, N, C], targets
    [N] or [N, C] -> [K, N, C]."""
    if targets.is_floating_point():
        return logits - (logits * targets).sum(-1, keepdim=True)
    return logits - logits.gather(2, targets[:, None].expand(len(logits), -1, 1))


_ROUNDS, _SHRINK, _LEAST = 40, 0.4, 1e-10


def best_mixture(logits: Tensor, targets: Tensor) -> Tensor:
    r"""argmin over a >= 0, \sum_i a_i = 1 of CE(\sum_i a_i z_i, y), for each row by itself: convex, in K numbers.

    Newton's method on CE(a) - mu \sum_i log a_i, with the step halved until that falls, while mu shrinks from 1 to
    1e-10; always the same number of rounds, in float64, and the host never waits. The cross-entropy of the result is
    within 1e-7 of the least, for up to 8 peers and logits of a standard deviation of up to 30.

    Args:
        logits: z_i of the K peers, [K, N, C].
        targets: y [N] or [N, C].

    Returns:
        a, float64 [K, N].
    """
    margins = _margins(logits.double(), targets).transpose(0, 1)
    rows, peers, _ = margins.shape
    a = margins.new_full((rows, peers), 1 / peers)
    halves = 0.5 ** torch.arange(8, device=a.device, dtype=a.dtype)
    system = torch.ones(peers + 1, peers + 1, device=a.device, dtype=a.dtype).repeat(rows, 1, 1)
    system[:, peers, peers] = 0
    mu = 1.0
    for _ in range(_ROUNDS):
        p = torch.einsum("nk,nkc->nc", a, margins).softmax(-1)
        mean = torch.einsum("nc,nkc->nk", p, margins)
        second = torch.einsum("nkc,nc,nlc->nkl", margins, p, margins)
        system[:, :peers, :peers] = second - mean[:, :, None] * mean[:, None, :] + torch.diag_embed(mu / a**2)
        wanted = F.pad(mu / a - mean, (0, 1))
        step = torch.linalg.solve_ex(system, wanted[:, :, None])[0][:, :peers, 0]
        # At most 0.99 of the way to the nearest edge.
        room = torch.where(step < 0, -a / step, torch.inf).amin(1, keepdim=True)
        tried = a + halves[:, None, None] * (0.99 * room).clamp_max(1) * step
        values = torch.einsum("tnk,nkc->tnc", tried, margins).logsumexp(-1) - mu * tried.log().sum(-1)
        a = tried.gather(0, values.argmin(0)[None, :, None].expand(1, rows, peers))[0]
        a = a / a.sum(1, keepdim=True)
        mu = max(_SHRINK * mu, _LEAST)
    return a.T

"""Layer-wise mutual contrastive learning (Yang, An, Zhou, Cai, Zhi, Wu, Xu, Zhang: "Online Knowledge Distillation via
Mutual Contrastive Learning for Visual Recognition"; TPAMI 2023, arXiv 2207.11518)."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import ClassVar, Literal, NamedTuple

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn

from losses.capabilities import EarlyExits, OuterProblem, OuterStep, StageTaps, Unsynchronised
from losses.contract import PeerInfo, Progress, Signals, Terms
from losses.contrast import ContrastiveOptions, Pair, totals
from losses.functional import mixtures, tempered_log_softmax
from losses.mcl import Contrastive

Parameters = dict[int, dict[str, Tensor]]
"""Of each resident, by name."""


class LMCLOptions(ContrastiveOptions):
    """Options of `lmcl`."""

    name: Literal["lmcl"] = "lmcl"
    memory_only: ClassVar[frozenset[str]] = ContrastiveOptions.memory_only | {"vcl_bank"}
    meta_interval: int | None = Field(
        50,
        ge=1,
        description="steps between two meta-optimisations of the weights, counted anew from the start of each epoch: "
        "50 on CIFAR, 500 on ImageNet; null: the weights stay as they are at first, about 1/2",
    )
    inner_steps: int = Field(2, ge=1, description="look-ahead steps on the contrastive losses in a meta-optimisation")
    hypergradient: Literal["exact", "published"] = Field(
        "exact",
        description="published: as the published code, which lost the factor of weight decay in its recursion",
    )
    replicas: Literal["synchronised", "published"] = Field(
        "synchronised",
        description="published: as the published code, replicas begin with heads, gates and banks of their own and "
        "never average the gradients of heads and gates; the numbers then depend on the placement",
    )
    vcl_bank: Literal["own", "published"] = Field(
        "own",
        description="memory: the bank that a peer's VCL takes; published: that of the first peer of the pair, for both",
    )


class LMCL(EarlyExits, OuterProblem, StageTaps, Unsynchronised, Contrastive):
    r"""Embeddings after every stage, contrasted between peers all-to-all, with weights that are learned.

    Peer i of S stages has an exit after each: after the last its own classifier, before it an auxiliary one. With the
    exits' pooled features f_{i,s} [N, D_i], logits z_{i,s}, embeddings e_{i,s} of unit length and

        w_{is,jz} = sigmoid(cos(P_{i,s} f_{i,s}, P_{j,z} f_{j,z}))  [N],       constant in L, P 128 rows high
        a_i = \sum_s g_{i,s} z_{i,s},   g_i = softmax_S(W_2 relu(W_1 [f_{i,1}; ...; f_{i,S}]))

    the objective is, with the losses of `losses.contrast` weighted row by row with w,

        L = \sum_{i,s} CE(z_{i,s}, y) + \sum_i CE(a_i, y) + \sum_{i,j} T^2 KL(softmax(a_j / T) || softmax(z_{i,S} / T))
            + 2 \sum_{i} \sum_{j != i} \sum_{s,z} w_{is,jz} [ \alpha VCL_{is} + \gamma SoftVCL_{is,jz}
                                                              + \beta ICL_{is,jz} + \lambda SoftICL_{is,jz} ]

    with a_j constant; the 2 is there because the published sum goes over ordered pairs of a loss that is symmetric.
    Exits, gates and projections are left behind at export.

    The weights are learned in an outer problem. Every `meta_interval` steps, on the batch of the step and from the
    peers as the step left them, theta_0, the peers look ahead by T_in = `inner_steps` steps on the weighted contrastive
    losses f_in(theta, phi) and one on f_out(theta) = \sum_{i,s} CE(z_{i,s}, y), by SGD with momentum mu and weight
    decay rho, beginning with v_0 = 0:

        v_{t+1} = \mu v_t + \nabla f_t(theta_t) + \rho theta_t,     theta_{t+1} = theta_t - \eta v_{t+1}

    and phi, the projections P, follows the gradient of f_out at the end of that path, by the peers' own kind of
    optimiser. With A = \nabla f_out(theta_T), B = 0, for t = T-1 .. 0:

        c = B - \eta A;   h, q = d<\nabla f_t(theta_t, phi), c> / d(theta, phi);   dphi += q
        A, B <- A (1 - \eta \rho) + \rho B + h,   \mu (B - \eta A)

    The graphs of all look-ahead steps are alive until then, so that nothing is computed twice. The peers themselves
    stay at theta_0, statistics of BatchNorm included.

    Deviations from the published code: as for MCL; every replica of a peer looks ahead along the mean of all replicas'
    gradients; a look-ahead step leaves banks and statistics of BatchNorm alone, where the published code keeps one
    extra update of each: there the rows of banks move between look-ahead steps, so that the second contrasts with rows
    of the first, which in a small case was 17 % of the meta-gradient. Exits of ImageNet's networks are the paper's, see
    `models.heads`.
    """

    name = "lmcl"
    Options = LMCLOptions
    options: LMCLOptions
    signals = ("logits", "exits", "aggregate", "embeddings", "match")
    private = ("logits", "exits")
    deployed = "best"

    @property
    def banks_differ_by_rank(self) -> bool:  # type: ignore[override]
        """As in the published code."""
        return self.options.replicas == "published"

    def unsynchronised(self, head: nn.Module) -> Sequence[nn.Parameter]:
        assert isinstance(head, Exits)
        if self.options.replicas == "synchronised":
            return ()
        return [*head.projections.parameters(), *head.gate.parameters()]

    @classmethod
    def taps(cls, options: LMCLOptions, num_stages: int) -> Sequence[int]:
        if num_stages < 2:
            raise ValueError(f"lmcl has an exit after each stage but the last, found {num_stages} stages")
        return range(1, num_stages)

    def head(self, peer: PeerInfo) -> nn.Module:
        return Exits(peer, self.options.width)

    def num_exits(self, head: nn.Module) -> int:
        assert isinstance(head, Exits)
        return len(head.match)

    def forward(
        self, residents: Sequence[int], signals: Sequence[Signals], targets: Tensor, progress: Progress
    ) -> Terms:
        terms: Terms = {}
        t = self.options.temperature
        aggregates = [tempered_log_softmax(peer["aggregate"].detach(), t) for peer in signals]
        taught = mixtures(aggregates, aggregates[0].new_ones(1, self.num_peers))
        for i in residents:
            last = signals[i]["exits"][:, -1]
            terms[i, "ce"] = self._classify(signals[i], targets)
            terms[i, "ce_aggregate"] = self.classify(signals[i]["aggregate"], targets)
            terms[i, "kd"] = t**2 * taught.kl(0, tempered_log_softmax(last, t))
        with torch.no_grad():
            weights = self.weights(residents, signals)
        return terms | self.contrast(residents, signals, targets, progress, weights)

    def _classify(self, own: Signals, targets: Tensor) -> Tensor:
        """sum_s CE(z_s, y)."""
        return torch.stack([self.classify(z, targets) for z in own["exits"].unbind(1)]).sum()

    def weights(self, residents: Sequence[int], signals: Sequence[Signals]) -> dict[Pair, Tensor]:
        """w [S_i, S_j, N] of each resident i and each other peer j."""
        return {
            (i, j): torch.einsum("nsd,nzd->szn", signals[i]["match"], signals[j]["match"]).sigmoid()
            for i in residents
            for j in range(self.num_peers)
            if j != i
        }

    def contrast(
        self,
        residents: Sequence[int],
        signals: Sequence[Signals],
        targets: Tensor,
        progress: Progress,
        weights: Mapping[Pair, Tensor],
    ) -> Terms:
        """The weighted contrastive terms of the residents, 2 included; arguments as for `forward`, `weights` as given
        back by the method of that name."""
        own_bank = self.options.vcl_bank == "own"
        rows = self.rows(residents, signals, targets, progress, own_bank=own_bank)
        return {key: 2 * term for key, term in totals(rows, weights, self.options).items()}

    # -- the outer problem --------------------------------------------------------------------------------------------

    @classmethod
    def has_outer_problem(cls, options: LMCLOptions) -> bool:
        return options.meta_interval is not None

    def outer(self, head: nn.Module) -> Sequence[nn.Parameter]:
        assert isinstance(head, Exits)
        return tuple(head.match.parameters()) if self.options.meta_interval else ()

    def outer_step(self, outer: OuterStep) -> Mapping[int, Sequence[Tensor]] | None:
        interval = self.options.meta_interval
        if interval is None or outer.progress.step % outer.progress.steps_per_epoch % interval:
            return None
        residents = list(outer.parameters)

        def inner(signals: Sequence[Signals]) -> Tensor:
            weights = self.weights(residents, signals)
            terms = self.contrast(residents, signals, outer.targets, outer.progress, weights)
            return outer.weight * torch.stack(list(terms.values())).sum()

        def outermost(signals: Sequence[Signals]) -> Tensor:
            return outer.weight * torch.stack([self._classify(signals[i], outer.targets) for i in residents]).sum()

        path = [inner] * self.options.inner_steps + [outermost]
        published = self.options.hypergradient == "published"
        return hypergradient(path, outermost, outer, published=published)


Objective = Callable[[Sequence[Signals]], Tensor]


def hypergradient(
    path: Sequence[Objective], final: Objective, outer: OuterStep, *, published: bool = False
) -> dict[int, list[Tensor]]:
    r"""d final(theta_T) / d phi along the look-ahead steps theta_0 .. theta_T, see `LMCL`.

    Args:
        path: f_0 .. f_{T-1}, of the signals at theta_t and phi.
        final: of the signals at theta_T.
        outer: the peers as functions of their parameters theta and phi.
        published: weight decay counts as 1 where it multiplies B, as in the published code.

    Returns:
        For each resident the gradients of its parameters `outer.outer`, of this rank's rows.
    """
    phi = {k: {name: outer.parameters[k][name] for name in names} for k, names in outer.outer.items()}
    theta = {
        k: {name: p.detach() for name, p in own.items() if name not in phi[k]} for k, own in outer.parameters.items()
    }
    decay = {k: [outer.weight_decay[k][name] for name in own] for k, own in theta.items()}
    lr, mu = outer.lr, outer.momentum

    def visit(f: Objective, at: Parameters, *, again: bool = True) -> _Visit:
        leaves = {k: {name: p.requires_grad_() for name, p in _detached(own).items()} for k, own in at.items()}
        chosen = {k: {name: p.requires_grad_(again) for name, p in _detached(own).items()} for k, own in phi.items()}
        with torch.enable_grad():
            value = f(outer.show({k: {**leaves[k], **chosen[k]} for k in leaves}))
            return _Visit(leaves, chosen, _derivatives(value, leaves, create_graph=again))

    visits: list[_Visit] = []
    velocity = {k: [torch.zeros_like(p) for p in own.values()] for k, own in theta.items()}
    for f in path:
        visits.append(visit(f, theta))
        g, moved = outer.average(visits[-1].constant()), {}
        for k, own in theta.items():
            for v, d, p, rho in zip(velocity[k], g[k], own.values(), decay[k], strict=True):
                v.mul_(mu).add_(d).add_(p, alpha=rho)
            moved[k] = dict(zip(own, torch._foreach_sub(list(own.values()), velocity[k], alpha=lr), strict=True))
        theta = moved

    a = outer.average(visit(final, theta, again=False).constant())
    b = {k: [torch.zeros_like(x) for x in own] for k, own in a.items()}
    total = {k: [torch.zeros_like(p) for p in own.values()] for k, own in phi.items()}
    while visits:
        leaves, chosen, g = visits.pop()
        c = {k: torch._foreach_sub(b[k], a[k], alpha=lr) for k in a}
        with torch.enable_grad():
            along = torch.stack([(x * y).sum() for k in g for x, y in zip(g[k], c[k], strict=True)]).sum()
        second = _derivatives(along, {k: {**leaves[k], **chosen[k]} for k in leaves})
        for k, found in second.items():
            torch._foreach_add_(total[k], found[len(leaves[k]) :])
        h = outer.average({k: found[: len(leaves[k])] for k, found in second.items()})
        for k in a:
            for i, rho in enumerate(decay[k]):
                of_b = 1.0 if published else rho
                a[k][i], b[k][i] = (
                    a[k][i] * (1 - lr * rho) + of_b * b[k][i] + h[k][i],
                    mu * (b[k][i] - lr * a[k][i]),
                )
    return total


class _Visit(NamedTuple):
    """What a look-ahead step leaves for the way back: with its graph, nothing has to be computed twice."""

    theta: Parameters
    phi: Parameters
    gradient: dict[int, list[Tensor]]
    """Of theta, a function of both."""

    def constant(self) -> dict[int, list[Tensor]]:
        return {k: [g.detach() for g in own] for k, own in self.gradient.items()}


def _detached(parameters: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name: p.detach() for name, p in parameters.items()}


def _derivatives(value: Tensor, leaves: Parameters, *, create_graph: bool = False) -> dict[int, list[Tensor]]:
    """Zeros where a leaf is not reached."""
    flat = [p for own in leaves.values() for p in own.values()]
    found = iter(torch.autograd.grad(value, flat, create_graph=create_graph, allow_unused=True, materialize_grads=True))
    return {k: [next(found) for _ in own] for k, own in leaves.items()}


class Exits(nn.Module):
    """{`logits`, `features`, `stage1` ..} -> `exits` [N, S, C] and `embeddings` [N, S, d] of all exits, `aggregate`
    [N, C] of their logits, and `match` [N, S, 128] of unit length, whose products are the cosines of the weights."""

    def __init__(self, peer: PeerInfo, width: int) -> None:
        super().__init__()
        exits, inputs = len(peer.stages), peer.num_features
        self.auxiliary = nn.ModuleList([peer.auxiliary(stage, "lmcl") for stage in range(1, exits)])
        self.projections = nn.ModuleList([peer.projection(inputs, width) for _ in range(exits)])
        self.gate = nn.Sequential(nn.Linear(exits * inputs, inputs), nn.ReLU(), nn.Linear(inputs, exits))
        self.match = nn.ModuleList([nn.Linear(inputs, 128) for _ in range(exits)])

    def forward(self, signals: Signals) -> dict[str, Tensor]:
        shown = [head(signals[f"stage{j + 1}"]) for j, head in enumerate(self.auxiliary)]
        features = [*(exit_["features"] for exit_ in shown), signals["features"]]
        exits = torch.stack([*(exit_["logits"] for exit_ in shown), signals["logits"]], 1)
        gate = self.gate(torch.cat(features, 1)).softmax(-1)
        matches = [F.normalize(match(f).float(), dim=-1) for match, f in zip(self.match, features, strict=True)]
        return {
            "exits": exits,
            "aggregate": torch.einsum("ns,nsc->nc", gate.float(), exits.float()),
            "embeddings": torch.stack([p(f) for p, f in zip(self.projections, features, strict=True)], 1),
            "match": torch.stack(matches, 1),
        }

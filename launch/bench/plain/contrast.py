"""MCL and L-MCL, pair by pair, as their equations say; negatives from the batch."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import models
from launch.bench.plain.networks import Embedding, Shape, WithExits
from launch.bench.plain.objectives import Objective, added, kd
from models.stages import stages

ALPHA, BETA, GAMMA, LAMBDA, TAU, TEMPERATURE = 0.1, 0.1, 1.0, 1.0, 0.1, 3.0
LR, MOMENTUM, DECAY = 0.1, 0.9, 5e-4


def hard(z: Tensor, targets: Tensor, w: Tensor) -> Tensor:
    """-mean_n w_n mean_{p in P_n} (z_np - log sum_{k != n} exp z_nk)."""
    others = 1 - torch.eye(len(z))
    positives = torch.eq(targets.view(-1, 1), targets.view(1, -1)).float() * others
    log_probabilities = z - torch.log((torch.exp(z) * others).sum(1, keepdim=True))
    return -(w * (positives * log_probabilities).sum(1) / positives.sum(1).clamp(min=1)).mean()


def soft(student: Tensor, teacher: Tensor, w: Tensor) -> Tensor:
    """T^2 mean_n w_n KL(softmax(u_n / T) || softmax(z_n / T))."""
    p = F.softmax(teacher.detach() / TEMPERATURE, dim=1)
    log_q = F.log_softmax(student / TEMPERATURE, dim=1)
    return TEMPERATURE**2 * (w * F.kl_div(log_q, p, reduction="none").sum(1)).mean()


def of_pair(a: Tensor, b: Tensor, targets: Tensor, w: Tensor, vcl: float = 1.0) -> Tensor:
    """All four losses of two sets of embeddings [N, d], both ways; VCL counts `vcl` times."""
    aa, bb, ab, ba = a @ a.T / TAU, b @ b.T / TAU, a @ b.T / TAU, b @ a.T / TAU
    loss = ALPHA * vcl * (hard(aa, targets, w) + hard(bb, targets, w))
    loss = loss + GAMMA * (soft(aa, bb, w) + soft(bb, aa, w))
    loss = loss + BETA * (hard(ab, targets, w) + hard(ba, targets, w))
    return loss + LAMBDA * (soft(ab, ba, w) + soft(ba, ab, w))


class MCL(Objective):
    """Each peer's embeddings among its own and the others'."""

    def __init__(self, shape: Shape, peers: int = 2) -> None:
        super().__init__()
        self.peers = peers
        self.networks = nn.ModuleList([WithExits(shape, (), "rule") for _ in range(peers)])
        self.embed = nn.ModuleList([Embedding(network.width) for network in self.networks])  # type: ignore[arg-type]

    def losses(self, images: Sequence[Tensor], targets: Tensor, epoch: int) -> list[Tensor]:
        found = [network(images[0]) for network in self.networks]
        e = [embed(features[0]) for embed, (_, features) in zip(self.embed, found, strict=True)]
        loss = added(F.cross_entropy(logits[0], targets) for logits, _ in found)
        once = torch.ones(len(targets))
        for i in range(self.peers):
            for j in range(i + 1, self.peers):
                loss = loss + of_pair(e[i], e[j], targets, once, 1 / (self.peers - 1))
        return [loss]


class LMCL(Objective):
    """Exits after every stage, contrasted all-to-all, with weights that a look-ahead learns.

    Args:
        shape: of the networks.
        peers: how many.
        interval: steps between two meta-optimisations; None: there is none.
    """

    def __init__(self, shape: Shape, peers: int = 2, interval: int | None = None) -> None:
        super().__init__()
        self.peers, self.interval = peers, interval
        nets = [WithExits(shape, tuple(range(_before(shape), 0, -1)), "lmcl") for _ in range(peers)]
        self.networks, width, exits = nn.ModuleList(nets), nets[0].width, len(nets[0].exits) + 1
        self.exits = exits
        self.embed = nn.ModuleList([Embedding(width) for _ in range(peers * exits)])
        self.gates = nn.ModuleList(
            [nn.Sequential(nn.Linear(exits * width, width), nn.ReLU(), nn.Linear(width, exits)) for _ in range(peers)]
        )
        self.match = nn.ModuleList([nn.Linear(width, 128) for _ in range(peers * exits)])
        self.meta = torch.optim.SGD(
            self.match.parameters(), lr=LR, momentum=MOMENTUM, weight_decay=DECAY, nesterov=True
        )

    def groups(self) -> list[nn.Module]:
        return [nn.ModuleList([self.networks, self.embed, self.gates])]

    def losses(self, images: Sequence[Tensor], targets: Tensor, epoch: int) -> list[Tensor]:
        logits, features = self._show(images[0])
        loss = self._classify(logits, targets)
        aggregates = []
        for own, seen, gate in zip(logits, features, self.gates, strict=True):
            g = F.softmax(gate(torch.cat(seen, 1)), dim=1)
            aggregates.append(added(g[:, s : s + 1] * z for s, z in enumerate(own)))
        for own, aggregate in zip(logits, aggregates, strict=True):
            loss = loss + F.cross_entropy(aggregate, targets)
            for other in aggregates:
                loss = loss + kd(own[-1], other.detach(), TEMPERATURE)
        with torch.no_grad():
            projected = self._projected(features)
        return [loss + self._contrast(features, projected, targets)]

    def _show(self, images: Tensor) -> tuple[list[list[Tensor]], list[list[Tensor]]]:
        found = [network(images) for network in self.networks]
        return [logits for logits, _ in found], [features for _, features in found]

    def _classify(self, logits: Sequence[Sequence[Tensor]], targets: Tensor) -> Tensor:
        return added(F.cross_entropy(z, targets) for own in logits for z in own)

    def _projected(self, features: Sequence[Sequence[Tensor]]) -> list[Tensor]:
        flat = [f for seen in features for f in seen]
        return [F.normalize(match(f), dim=1) for match, f in zip(self.match, flat, strict=True)]

    def _contrast(self, features: Sequence[Sequence[Tensor]], projected: Sequence[Tensor], targets: Tensor) -> Tensor:
        """The sum over ordered pairs of peers and all pairs of their exits."""
        flat = [f for seen in features for f in seen]
        e = [embed(f) for embed, f in zip(self.embed, flat, strict=True)]
        loss = torch.zeros(())
        for i in range(self.peers):
            for j in range(self.peers):
                for k in range(self.exits) if i != j else ():
                    for z in range(self.exits):
                        one, other = i * self.exits + k, j * self.exits + z
                        w = torch.sigmoid((projected[one] * projected[other]).sum(1))
                        loss = loss + of_pair(e[one], e[other], targets, w)
        return loss

    # -- the outer step -----------------------------------------------------------------------------------------------

    def after(self, images: Sequence[Tensor], targets: Tensor, step: int) -> None:
        if self.interval is None or step % self.interval:
            return
        self.meta.zero_grad()
        for p, gradient in zip(self.match.parameters(), self.outer_gradients(images[0], targets, LR), strict=True):
            p.grad = gradient
        self.meta.step()

    def outer_gradients(self, images: Tensor, targets: Tensor, lr: float) -> list[Tensor]:
        """Of the projections: two look-ahead steps on the contrastive losses and one on the classification, replayed
        one by one on the way back and differentiated twice by autograd."""

        def inner() -> Tensor:
            _, features = self._show(images)
            return self._contrast(features, self._projected(features), targets)

        def outer() -> Tensor:
            return self._classify(self._show(images)[0], targets)

        path: list[Callable[[], Tensor]] = [inner, inner, outer]
        theta = [*self.networks.parameters(), *self.embed.parameters()]
        phi = list(self.match.parameters())
        buffers = [(b, b.clone()) for b in self.networks.buffers()]
        states, velocity = [], [torch.zeros_like(p) for p in theta]
        for f in path:
            states.append([p.detach().clone() for p in theta])
            for p, v, gradient in zip(theta, velocity, _gradients(f(), theta), strict=True):
                v.mul_(MOMENTUM).add_(gradient).add_(p.data, alpha=DECAY)
                p.data.sub_(lr * v)
        a = _gradients(outer(), theta)
        b = [torch.zeros_like(p) for p in theta]
        total = [torch.zeros_like(p) for p in phi]
        for f, state in zip(reversed(path), reversed(states), strict=True):
            for p, value in zip(theta, state, strict=True):
                p.data.copy_(value)
            along = _gradients(f(), theta, create_graph=True)
            x = added((g * (y - lr * z)).sum() for g, y, z in zip(along, b, a, strict=True))
            found = _gradients(x, [*theta, *phi])
            for t, q in zip(total, found[len(theta) :], strict=True):
                t.add_(q)
            before = a
            a = [y * (1 - lr * DECAY) + DECAY * z + h for y, z, h in zip(a, b, found, strict=False)]
            b = [MOMENTUM * (z - lr * y) for y, z in zip(before, b, strict=True)]
        for buffer, value in buffers:
            buffer.copy_(value)
        return total


def _before(shape: Shape) -> int:
    """Stages before the last."""
    return len(stages(models.create(shape.network, shape.classes), 3, shape.size)) - 1


def _gradients(value: Tensor, of: Sequence[Tensor], *, create_graph: bool = False) -> list[Tensor]:
    return list(torch.autograd.grad(value, of, create_graph=create_graph, allow_unused=True, materialize_grads=True))

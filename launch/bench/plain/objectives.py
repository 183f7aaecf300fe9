"""The methods' losses as their equations say, one term after another, in the way of the published code."""

from __future__ import annotations

import copy
import functools
import math
import operator
from collections.abc import Iterable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import models
from launch.bench.plain.networks import Branches, Fusion, Gate, Shape, WithExits


def kd(student: Tensor, teacher: Tensor, temperature: float) -> Tensor:
    """T^2 KL(softmax(t / T) || softmax(z / T))."""
    p, log_q = F.softmax(teacher / temperature, dim=1), F.log_softmax(student / temperature, dim=1)
    return temperature**2 * F.kl_div(log_q, p, reduction="batchmean")


def added(tensors: Iterable[Tensor]) -> Tensor:
    """One after another."""
    return functools.reduce(operator.add, tensors)


def ramp(epoch: int, length: int = 80) -> float:
    """The weight of the distillation terms in an epoch."""
    return math.exp(-5 * (1 - min(epoch, length) / length) ** 2)


class Objective(nn.Module):
    """Networks, and what they learn by."""

    peers: int = 2
    views: int = 1
    """Augmentations of an image."""

    def groups(self) -> list[nn.Module]:
        """One optimiser each."""
        return [self]

    def losses(self, images: Sequence[Tensor], targets: Tensor, epoch: int) -> list[Tensor]:
        """What is differentiated, each by itself.

        Args:
            images: of each view, [N, 3, H, W].
            targets: [N].
            epoch: from 0.
        """
        raise NotImplementedError

    def after(self, images: Sequence[Tensor], targets: Tensor, step: int) -> None:
        """What follows the optimisers' update number `step`, from 0."""


class Networks(Objective):
    """Peers that learn alone, each with its optimiser."""

    def __init__(self, shape: Shape, peers: int = 2) -> None:
        super().__init__()
        self.peers = peers
        self.networks = nn.ModuleList([models.create(shape.network, shape.classes) for _ in range(peers)])

    def groups(self) -> list[nn.Module]:
        return list(self.networks)

    def losses(self, images: Sequence[Tensor], targets: Tensor, epoch: int) -> list[Tensor]:
        return [F.cross_entropy(network(images[0]), targets) for network in self.networks]


class DML(Networks):
    """CE(z_i) + 1/(K-1) sum_j KL(p_j || p_i), each pair by itself."""

    def losses(self, images: Sequence[Tensor], targets: Tensor, epoch: int) -> list[Tensor]:
        outputs = [network(images[0]) for network in self.networks]
        losses = []
        for i, output in enumerate(outputs):
            ce = F.cross_entropy(output, targets)
            kl = added(kd(output, other.detach(), 1.0) for j, other in enumerate(outputs) if j != i)
            losses.append(ce + kl / (self.peers - 1))
        return losses


class KDCL(Networks):
    """CE(z_i) + KD(z_i, least margins of all), each peer on a view of its own."""

    def __init__(self, shape: Shape, peers: int = 2) -> None:
        super().__init__(shape, peers)
        self.views = peers

    def losses(self, images: Sequence[Tensor], targets: Tensor, epoch: int) -> list[Tensor]:
        outputs = [network(x) for network, x in zip(self.networks, images, strict=True)]
        margins = [z.detach() - z.detach().gather(1, targets.view(-1, 1)) for z in outputs]
        teacher = torch.stack(margins).min(0)[0]
        return [F.cross_entropy(z, targets) + kd(z, teacher, 2.0) for z in outputs]


class DCL(Networks):
    """CE alone; every 10 steps parameters are mixed."""

    def after(self, images: Sequence[Tensor], targets: Tensor, step: int) -> None:
        if (step + 1) % 10:
            return
        with torch.no_grad():
            for parameters in zip(*(network.parameters() for network in self.networks), strict=True):
                weighted, total = torch.zeros_like(parameters[0]), torch.zeros_like(parameters[0])
                for k, w in enumerate(parameters):
                    m = torch.ones_like(w)
                    for j, other in enumerate(parameters):
                        if j != k:
                            m = m * other
                    weighted, total = weighted + m.abs() * w, total + m.abs()
                mixed = weighted / (total + 1e-18)
                for w in parameters:
                    w.data = 0.1 * mixed + 0.9 * w.data


class Codistillation(Networks):
    """CE(z_i) + KL(mean of the others' stale probabilities || p_i); copies are taken every 10 steps."""

    def __init__(self, shape: Shape, peers: int = 2) -> None:
        super().__init__(shape, peers)
        self.copies: list[nn.Module] = []

    def losses(self, images: Sequence[Tensor], targets: Tensor, epoch: int) -> list[Tensor]:
        losses = []
        for i, network in enumerate(self.networks):
            output = network(images[0])
            loss = F.cross_entropy(output, targets)
            if self.copies:
                with torch.no_grad():
                    others = [F.softmax(x(images[0]), dim=1) for j, x in enumerate(self.copies) if j != i]
                    stale = added(others) / len(others)
                loss = loss + F.kl_div(F.log_softmax(output, dim=1), stale, reduction="batchmean")
            losses.append(loss)
        return losses

    def after(self, images: Sequence[Tensor], targets: Tensor, step: int) -> None:
        if (step + 1) % 10 == 0:
            self.copies = [copy.deepcopy(network).eval() for network in self.networks]


class DCM(Objective):
    """The CE of three classifiers of each of two networks, and the KL of all 18 pairs of different networks."""

    def __init__(self, shape: Shape, peers: int = 2) -> None:
        super().__init__()
        self.networks = nn.ModuleList([WithExits(shape, (2, 1), "dcm") for _ in range(peers)])

    def losses(self, images: Sequence[Tensor], targets: Tensor, epoch: int) -> list[Tensor]:
        outputs = [network(images[0])[0] for network in self.networks]
        loss = added(F.cross_entropy(z, targets) for own in outputs for z in own)
        for i, own in enumerate(outputs):
            for j, others in enumerate(outputs):
                if i != j:
                    loss = loss + added(kd(z, other.detach(), 1.0) for z in own for other in others)
        return [loss]


class Branched(Objective):
    """Branches of one network, with one optimiser."""

    def __init__(self, shape: Shape, peers: int) -> None:
        super().__init__()
        self.peers = peers
        self.net = Branches(shape, peers)

    def shared(self, images: Sequence[Tensor]) -> Tensor:
        """The trunk's map."""
        return self.net.trunk(images[0])


class ONE(Branched):
    """The branches and the gated ensemble learn the classes, and the branches from the ensemble."""

    def __init__(self, shape: Shape, peers: int = 3) -> None:
        super().__init__(shape, peers)
        self.gate = Gate(self.net.channels, peers)

    def losses(self, images: Sequence[Tensor], targets: Tensor, epoch: int) -> list[Tensor]:
        x = self.shared(images)
        logits, _, _ = self.net.split([x] * self.peers)
        g = self.gate(x)
        ensemble = added(g[:, k : k + 1] * z for k, z in enumerate(logits))
        loss = F.cross_entropy(ensemble, targets)
        for z in logits:
            loss = loss + F.cross_entropy(z, targets) + ramp(epoch) * kd(z, ensemble.detach(), 3.0)
        return [loss]


class FFL(Branched):
    """Two branches and the classifier of their fused maps."""

    def __init__(self, shape: Shape, peers: int = 2) -> None:
        super().__init__(shape, peers)
        self.fusion = Fusion(self.net.last_channels, peers, shape.classes)

    def groups(self) -> list[nn.Module]:
        return [self.net, self.fusion]

    def losses(self, images: Sequence[Tensor], targets: Tensor, epoch: int) -> list[Tensor]:
        logits, _, maps = self.net.split([self.shared(images)] * self.peers)
        fused = self.fusion(maps)
        mean = (added(logits) / self.peers).detach()
        loss = F.cross_entropy(fused, targets) + ramp(epoch) * kd(fused, mean, 3.0)
        for z in logits:
            loss = loss + F.cross_entropy(z, targets) + ramp(epoch) * kd(z, fused.detach(), 3.0)
        return [loss]


class OKDDip(Branched):
    """Peers learn from what their attention mixes, the last one, the leader, from their mean; nothing is detached."""

    def __init__(self, shape: Shape, peers: int = 3) -> None:
        super().__init__(shape, peers)
        width = self.net.width
        self.query = nn.Linear(width, width // 8, bias=False)
        self.key = nn.Linear(width, width // 8, bias=False)

    def losses(self, images: Sequence[Tensor], targets: Tensor, epoch: int) -> list[Tensor]:
        logits, features, _ = self.net.split([self.shared(images)] * self.peers)
        peers, h = torch.stack(logits[:-1], 1), torch.stack(features[:-1], 1)
        attention = F.softmax(torch.bmm(self.query(h), self.key(h).permute(0, 2, 1)), dim=-1)
        mixed = torch.bmm(attention, peers)
        loss = ramp(epoch) * kd(logits[-1], peers.mean(1), 3.0)
        for a in range(self.peers - 1):
            loss = loss + ramp(epoch) * kd(peers[:, a], mixed[:, a], 3.0)
        for z in logits:
            loss = loss + F.cross_entropy(z, targets)
        return [loss]


class CLILR(Branched):
    """1/2 CE(z_k) + 1/2 KL(mean of the others || z_k) at T = 2; the trunk follows the mean of the gradients."""

    def __init__(self, shape: Shape, peers: int = 3) -> None:
        super().__init__(shape, peers)

    def losses(self, images: Sequence[Tensor], targets: Tensor, epoch: int) -> list[Tensor]:
        x = self.shared(images)
        x.register_hook(lambda gradient: gradient / self.peers)
        logits, _, _ = self.net.split([x] * self.peers)
        loss = torch.zeros(())
        for k, z in enumerate(logits):
            mean = added(other for j, other in enumerate(logits) if j != k) / (self.peers - 1)
            loss = loss + 0.5 * F.cross_entropy(z, targets) + 0.5 * kd(z, mean.detach(), 2.0) / 4
        return [loss]


class PCL(Branched):
    """Branches on a view each, a classifier of all their features, and moving averages that teach the others."""

    def __init__(self, shape: Shape, peers: int = 3) -> None:
        super().__init__(shape, peers)
        self.views = peers
        self.ensemble = nn.Linear(peers * self.net.width, shape.classes)
        self.ema = copy.deepcopy(self.net).requires_grad_(False)

    def losses(self, images: Sequence[Tensor], targets: Tensor, epoch: int) -> list[Tensor]:
        logits, features, _ = self.net.split([self.net.trunk(x) for x in images])
        together = self.ensemble(torch.cat(features, 1))
        with torch.no_grad():
            teachers, _, _ = self.ema.split([self.ema.trunk(x) for x in images])
        loss = F.cross_entropy(together, targets)
        for j, z in enumerate(logits):
            loss = loss + F.cross_entropy(z, targets) + ramp(epoch) * kd(z, together.detach(), 3.0)
            for k, teacher in enumerate(teachers):
                if k != j:
                    loss = loss + ramp(epoch) * kd(z, teacher, 3.0) / (self.peers - 1)
        return [loss]

    def after(self, images: Sequence[Tensor], targets: Tensor, step: int) -> None:
        phi = min(1 - 1 / (step + 1), 0.999)
        for average, p in zip(self.ema.parameters(), self.net.parameters(), strict=True):
            average.data.mul_(phi).add_(p.data, alpha=1 - phi)

"""MCL's and L-MCL's contrastive losses in float64 as the published code adds them up: loops over ordered pairs of
peers, over their exits and over anchors.

Nothing here calls the code under test. Teachers are constant.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from losses import Terms
from tests.losses.double import softmax

NAMES = ("vcl", "soft_vcl", "icl", "soft_icl")


class Row(NamedTuple):
    """The logits of one anchor, each over all its candidates."""

    within: Tensor
    across: Tensor
    teacher_within: Tensor
    teacher_across: Tensor
    positives: tuple[Sequence[int], Sequence[int]]
    """Columns of the positives, of `within` and of `across`, and"""
    denominator: tuple[Sequence[int], Sequence[int]]
    """of all that the anchor is contrasted with."""


@dataclass
class FromBatch:
    """Anchors e[i] [N, S_i, d] among candidates c[i] [G, S_i, d], of which the first N are of the anchors' images."""

    e: Sequence[Tensor]
    c: Sequence[Tensor]
    y: Tensor

    def row(self, i: int, k: int, j: int, z: int, n: int, visited: int) -> Row:
        others = [g for g in range(len(self.y)) if g != n]
        positives = [g for g in others if self.y[g] == self.y[n]]
        return Row(
            self.c[i][:, k] @ self.e[i][n, k],
            self.c[j][:, z] @ self.e[i][n, k],
            self.c[j][:, z] @ self.e[j][n, z],
            self.c[i][:, k] @ self.e[j][n, z],
            (positives, positives),
            (others, others),
        )


@dataclass
class FromMemory:
    """Anchors e[i] [N, S_i, d] among the rows of banks [n, d] of the images [N, 1 + P + Q]; Q may differ by anchor."""

    e: Sequence[Tensor]
    banks: Sequence[Tensor]
    images: Sequence[Sequence[int]]
    positives: int
    published: bool = False

    def row(self, i: int, k: int, j: int, z: int, n: int, visited: int) -> Row:
        ids, mates = self.images[n], self.images[n][1:]
        own, others = (visited, visited) if self.published else (i, j)
        return Row(
            self.banks[own][mates] @ self.e[i][n, k],
            self.banks[j][ids] @ self.e[i][n, k],
            self.banks[others][mates] @ self.e[j][n, z],
            self.banks[i][ids] @ self.e[j][n, z],
            (range(self.positives), range(1 + self.positives)),
            (range(len(mates)), range(len(ids))),
        )


Source = FromBatch | FromMemory


def hard(logits: Tensor, positives: Sequence[int], denominator: Sequence[int]) -> Tensor | float:
    if not positives:
        return 0.0
    log_total = logits[list(denominator)].exp().sum().log()
    return -(logits[list(positives)] - log_total).sum() / len(positives)


def soft(student: Tensor, teacher: Tensor, t: float) -> Tensor:
    p, q = softmax(teacher.detach() / t), softmax(student / t)
    return t**2 * (p * (p / q).log()).sum()


def of_anchors(source: Source, i: int, k: int, j: int, z: int, w: Tensor | None, o: Any, visited: int = 0) -> Terms:
    """The four losses of exit k of peer i against exit z of peer j, means over the anchors of peer i."""
    n_rows = len(source.e[i])
    total: dict[str, Any] = dict.fromkeys(NAMES, 0.0)
    for n in range(n_rows):
        row = source.row(i, k, j, z, n, visited)
        within, across, teacher_within, teacher_across = (x / o.tau for x in row[:4])
        found = {
            "vcl": o.alpha * hard(within, row.positives[0], row.denominator[0]),
            "icl": o.beta * hard(across, row.positives[1], row.denominator[1]),
            "soft_vcl": o.gamma * soft(within, teacher_within, o.temperature),
            "soft_icl": o.lam * soft(across, teacher_across, o.temperature),
        }
        for name, x in found.items():
            total[name] = total[name] + (1.0 if w is None else w[n]) * x / n_rows
    return {(i, name): x for name, x in total.items()}


def added(*parts: Terms) -> Terms:
    total: Terms = {}
    for part in parts:
        for key, x in part.items():
            total[key] = total[key] + x if key in total else x
    return total


def mcl_contrast(source: Source, o: Any) -> Terms:
    """VCL of each peer once; ICL of all i < j, both directions; soft terms of ordered pairs."""
    peers = range(len(source.e))
    terms: Terms = {}
    for i in peers:
        for j in peers:
            if i != j:
                found = of_anchors(source, i, 0, j, 0, None, o)
                if (i, "vcl") in terms:
                    del found[i, "vcl"]
                terms = added(terms, found)
    return terms


def lmcl_contrast(source: Source, w: Mapping[tuple[int, int], Tensor], o: Any) -> Terms:
    """L-MCL's loop: for i, for j != i, for k, for z, of a pair loss that holds both directions.

    Args:
        source: of anchors and candidates.
        w: (i, j) -> [S_i, S_j, N].
        o: options.
    """
    terms: Terms = {}
    peers = range(len(source.e))
    for i in peers:
        for j in peers:
            if i == j:
                continue
            for k in range(source.e[i].shape[1]):
                for z in range(source.e[j].shape[1]):
                    weights = w[i, j][k, z]
                    terms = added(
                        terms,
                        of_anchors(source, i, k, j, z, weights, o, visited=i),
                        of_anchors(source, j, z, i, k, weights, o, visited=i),
                    )
    return terms


# -- numbers, and the comparison --------------------------------------------------------------------------------------


def unit_rows(seed: int, *shape: int) -> Tensor:
    """Rows of unit length, in float64, but numbers that float32 has too."""
    x = np.random.default_rng(seed).normal(size=shape)
    return torch.tensor(x / np.linalg.norm(x, axis=-1, keepdims=True)).float().double()


def weights(sizes: Sequence[int], n: int, seed: int = 5) -> dict[tuple[int, int], Tensor]:
    """Random w [S_i, S_j, N] with w_ij = w_ji transposed."""
    rng = np.random.default_rng(seed)
    w: dict[tuple[int, int], Tensor] = {}
    for i, a in enumerate(sizes):
        for j, b in enumerate(sizes[:i]):
            w[i, j] = torch.tensor(rng.uniform(0.2, 0.8, size=(a, b, n))).float().double()
            w[j, i] = w[i, j].transpose(0, 1)
    return w


def leaves(tensors: Sequence[Tensor], dtype: torch.dtype) -> list[Tensor]:
    return [x.to(dtype, copy=True).requires_grad_() for x in tensors]


def number(x: Tensor | float) -> float:
    return x.item() if isinstance(x, Tensor) else x


def gradients(term: Tensor | float, by: Sequence[Tensor]) -> list[Tensor]:
    """Zeros where nothing is reached."""
    if not isinstance(term, Tensor) or not term.requires_grad:
        return [torch.zeros_like(x) for x in by]
    found = torch.autograd.grad(term, list(by), retain_graph=True, allow_unused=True)
    return [torch.zeros_like(x) if g is None else g for g, x in zip(found, by, strict=True)]


def assert_close(found: Tensor, expected: Tensor, tolerance: float, what: str = "") -> None:
    """Relative to the largest entry."""
    assert torch.isfinite(found).all(), what
    error, largest = (found.double() - expected.double()).abs().max(), expected.abs().max()
    assert error <= tolerance * largest + 1e-15, f"{what}: off by {error:.1e}, the largest entry is {largest:.1e}"


def assert_same(
    found: Terms, expected: Terms, by: Sequence[Tensor], exact_by: Sequence[Tensor], tolerance: float = 3e-6
) -> None:
    """Each term and its gradient by everything."""
    assert found.keys() == expected.keys()
    for key, term in found.items():
        np.testing.assert_allclose(term.item(), number(expected[key]), rtol=tolerance, err_msg=str(key))
        right = gradients(expected[key], exact_by)
        for i, (a, b) in enumerate(zip(gradients(term, by), right, strict=True)):
            assert_close(a, b, tolerance, f"{key} by tensor {i}")


def along(term: Tensor, by: Sequence[Tensor], seed: int = 9) -> list[Tensor]:
    """The gradient of the gradient's product with a random direction."""
    g = torch.autograd.grad(term, list(by), create_graph=True, allow_unused=True, materialize_grads=True)
    rng = np.random.default_rng(seed)
    product = torch.stack([(x * torch.tensor(rng.normal(size=x.shape)).to(x.dtype)).sum() for x in g]).sum()
    return gradients(product, by)


Call = Callable[[Sequence[int], Sequence[Mapping[str, Tensor]]], Terms]


def assert_shares_add_up(
    call: Call,
    shown: Sequence[Mapping[str, Tensor]],
    private: Sequence[str],
    expected: Terms,
    exact: Sequence[Mapping[str, Tensor]],
    groups: Sequence[Sequence[Sequence[int]]],
    tolerance: float = 3e-6,
) -> None:
    """The terms of the residents of each rank are those of the whole, and the ranks' gradients, those that travel to
    other peers' signals included, add up to the whole's.

    Args:
        call: (residents, signals of all peers) -> terms, in float32.
        shown: float64 signals of every peer.
        private: names of signals that only residents have.
        expected: terms of `exact`, float64 leaves.
        exact: the leaves.
        groups: worlds, each a list of the residents of each rank.
    """
    exact_by = [x for peer in exact for x in peer.values()]
    right = gradients(sum(expected.values()), exact_by)
    for world in groups:
        total = [torch.zeros_like(x) for x in exact_by]
        for residents in world:
            live = [dict(zip(peer, leaves(list(peer.values()), torch.float32), strict=True)) for peer in shown]
            seen = [
                {name: x for name, x in peer.items() if k in residents or name not in private}
                for k, peer in enumerate(live)
            ]
            terms = call(residents, seen)
            assert set(terms) == {key for key in expected if key[0] in residents}
            for key, term in terms.items():
                assert term.dtype == torch.float32
                np.testing.assert_allclose(term.item(), number(expected[key]), rtol=tolerance, err_msg=str(key))
            by = [x for peer in live for x in peer.values()]
            found = gradients(torch.stack(list(terms.values())).sum(), by)
            total = [a + b.double() for a, b in zip(total, found, strict=True)]
        names = [f"{k}/{name}" for k, peer in enumerate(exact) for name in peer]
        for name, a, b in zip(names, total, right, strict=True):
            assert_close(a, b, tolerance, f"ranks {world}: {name}")

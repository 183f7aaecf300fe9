"""The contrastive losses against their equations, written out as float64 loops over peers, exits and anchors."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import permutations
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from losses import Terms
from losses.contrast import (
    ContrastiveOptions,
    PairRows,
    contrast,
    in_pieces,
    kl_of_all,
    rows_in_batch,
    rows_in_memory,
    totals,
)
from tests.losses.contrastive import (
    NAMES,
    FromBatch,
    FromMemory,
    added,
    along,
    assert_close,
    assert_same,
    gradients,
    leaves,
    of_anchors,
    unit_rows,
    weights,
)

N, D = 6, 5
CLASSES = torch.tensor([0, 1, 0, 2, 1, 0, 0, 2, 3, 1])
"""The anchor of class 2 has no positive in a batch of 6; that of class 3 has none at all."""
SIZES = [(1, 1), (3, 1), (2, 1, 3)]
BANKS, COLUMNS, POSITIVES = 20, 9, 2


def options(**changed: Any) -> ContrastiveOptions:
    return ContrastiveOptions(**{"name": "mcl", "alpha": 0.3, "beta": 0.7, "gamma": 1.1, "lam": 0.9} | changed)


def drawn(sizes: Sequence[int], n: int = N, seed: int = 0) -> list[Tensor]:
    """Embeddings [N, S_k, d] of every peer."""
    return [unit_rows(seed + k, n, s, D) for k, s in enumerate(sizes)]


def by_size(embeddings: Sequence[Tensor]) -> list[Tensor]:
    return [x.transpose(0, 1) for x in embeddings]


def all_weights(sizes: Sequence[int], dtype: torch.dtype) -> dict[tuple[int, int], Tensor]:
    return {pair: w.to(dtype) for pair, w in weights(sizes, N).items()}


def expected(source: FromBatch | FromMemory, sizes: Sequence[int], o: Any, w: Any, residents: Sequence[int]) -> Terms:
    """Peer i's anchors against those of every other peer; w None: 1."""
    return added(
        *(
            of_anchors(source, i, k, j, z, None if w is None else w[i, j][k, z], o)
            for i in residents
            for j in range(len(sizes))
            if j != i
            for k in range(sizes[i])
            for z in range(sizes[j])
        )
    )


def from_batch(
    e: Sequence[Tensor], c: Sequence[Tensor] | None, o: Any, w: Any, residents: Sequence[int] | None = None
) -> Terms:
    residents = range(len(e)) if residents is None else residents
    c = e if c is None else c
    return totals(rows_in_batch(residents, by_size(e), by_size(c), CLASSES[: len(c[0])], o), w, o)


def memory(peers: int, dtype: torch.dtype) -> tuple[list[Tensor], Tensor]:
    """Banks, and images of N anchors."""
    rng = np.random.default_rng(3)
    banks = [unit_rows(100 + k, BANKS, D).to(dtype) for k in range(peers)]
    return banks, torch.tensor(rng.integers(BANKS, size=(N, COLUMNS)))


def from_memory(e: Sequence[Tensor], o: Any, w: Any, residents: Sequence[int] | None = None, **more: bool) -> Terms:
    banks, images = memory(len(e), e[0].dtype)

    def products(bank: int, live: Tensor, rows: slice) -> Tensor:
        return torch.einsum("mnd,ncd->mnc", live, banks[bank][images[rows]])

    residents = range(len(e)) if residents is None else residents
    return totals(rows_in_memory(residents, by_size(e), products, POSITIVES, o, **more), w, o)


def memory_source(e: Sequence[Tensor], published: bool = False) -> FromMemory:
    banks, images = memory(len(e), torch.float64)
    return FromMemory(e, banks, images.tolist(), POSITIVES, published)


def plain(e: Sequence[Tensor], y: Tensor, w: Any = None, **changed: Any) -> dict[str, float]:
    """The four losses of a pair of peers, both directions."""
    o = options(alpha=1.0, beta=1.0, gamma=1.0, lam=1.0, **changed)
    terms = totals(rows_in_batch([0, 1], by_size(e), by_size(e), y, o), w or {}, o)
    return {name: sum(terms[i, name].item() for i in (0, 1)) for name in NAMES}


# -- values and gradients ---------------------------------------------------------------------------------------------


def assert_agrees(
    e: Sequence[Tensor], reference: Callable[[list[Tensor]], Terms], found: Callable[[list[Tensor]], Terms]
) -> None:
    """In float32, and in float64 to more digits, and there the derivative of the gradient too."""
    exact = leaves(e, torch.float64)
    right = reference(exact)
    for dtype, tolerance in ((torch.float32, 3e-6), (torch.float64, 1e-11)):
        live = leaves(e, dtype)
        terms = found(live)
        assert_same(terms, right, live, exact, tolerance)
    second = [along(torch.stack(list(x.values())).sum(), by) for x, by in ((terms, live), (right, exact))]
    for a, b in zip(*second, strict=True):
        assert_close(a, b, 1e-10, "second derivative")


@pytest.mark.parametrize("more", [0, 4])
@pytest.mark.parametrize("sizes", SIZES)
def test_in_batch(sizes: tuple[int, ...], more: int) -> None:
    """More candidates than anchors are tensors of their own, so that both gradients are seen."""
    o, k = options(), len(sizes)
    c = drawn(sizes, N + more, seed=50) if more else []

    def reference(x: list[Tensor]) -> Terms:
        source = FromBatch(x[:k], x[k:] or x, CLASSES[: N + more])
        return expected(source, sizes, o, weights(sizes, N), range(k))

    def found(x: list[Tensor]) -> Terms:
        return from_batch(x[:k], x[k:] or None, o, all_weights(sizes, x[0].dtype))

    assert_agrees([*drawn(sizes), *c], reference, found)


@pytest.mark.parametrize("sizes", SIZES)
def test_in_memory(sizes: tuple[int, ...]) -> None:
    o, everyone = options(), range(len(sizes))
    assert_agrees(
        drawn(sizes),
        lambda x: expected(memory_source(x), sizes, o, weights(sizes, N), everyone),
        lambda x: from_memory(x, o, all_weights(sizes, x[0].dtype)),
    )


@pytest.mark.parametrize("sizes", [(2, 3), (1, 2, 1)])
def test_the_published_bank_of_vcl(sizes: tuple[int, ...]) -> None:
    """Each pair visited in both orders, both peers among the bank of the first: the mean of the two visits. What is
    contrasted across peers is the same."""
    o, e, w = options(), drawn(sizes), weights(sizes, N)
    exact, live = leaves(e, torch.float64), leaves(e, torch.float32)
    source = memory_source(exact, published=True)
    parts = [
        of_anchors(source, i, k, j, z, w[i, j][k, z] / 2, o, visited)
        for i, j in permutations(range(len(sizes)), 2)
        for k in range(sizes[i])
        for z in range(sizes[j])
        for visited in (i, j)
    ]
    found = from_memory(live, o, all_weights(sizes, torch.float32), own_bank=False)
    assert_same(found, added(*parts), live, exact)
    own = from_memory(leaves(e, torch.float32), o, all_weights(sizes, torch.float32))
    for (i, name), term in own.items():
        assert (term == found[i, name]).item() == (name in ("icl", "soft_icl"))


@pytest.mark.parametrize("place", [from_batch, from_memory])
def test_derivatives_by_finite_differences(place: Callable[..., Terms]) -> None:
    """By one peer's anchors, of which no teacher is a function."""
    o, e, c = options(tau=0.5), drawn((2, 1)), drawn((2, 1), N + 2, seed=50)
    w, arguments = weights((2, 1), N), (c,) if place is from_batch else ()

    def function(own: Tensor) -> Tensor:
        return torch.stack(list(place([own, e[1]], *arguments, o, w, [0]).values()))

    for check in (torch.autograd.gradcheck, torch.autograd.gradgradcheck):
        assert check(function, (e[0].clone().requires_grad_(),), fast_mode=True)


@pytest.mark.parametrize("place", [from_batch, from_memory])
@pytest.mark.parametrize("residents", [[0], [1], [2], [0, 2], [2, 1]])
def test_residents_have_the_terms_of_their_anchors(residents: list[int], place: Callable[..., Terms]) -> None:
    sizes, o = (2, 1, 3), options()
    w, e = all_weights(sizes, torch.float64), drawn(sizes)
    arguments = (None,) if place is from_batch else ()
    part, whole = leaves(e, torch.float64), leaves(e, torch.float64)
    found = place(part, *arguments, o, w, residents)
    everything = place(whole, *arguments, o, w)
    assert list(found) == [(i, name) for i in residents for name in NAMES]
    assert_same(found, {key: everything[key] for key in found}, part, whole, 1e-12)


def test_teachers_are_constant_and_banks_keep_peers_apart() -> None:
    """SoftVCL of a peer reaches that peer alone; ICL in a batch reaches both; from memory nothing reaches others."""
    sizes, o = (2, 1, 3), options()
    w = all_weights(sizes, torch.float32)
    for in_batch in (True, False):
        live = leaves(drawn(sizes), torch.float32)
        found = from_batch(live, None, o, w) if in_batch else from_memory(live, o, w)
        for (i, name), term in found.items():
            reached = {k for k, g in enumerate(gradients(term, live)) if g.any()}
            assert reached == ({0, 1, 2} if in_batch and "icl" in name else {i})


def test_gradient_of_soft_icl_by_hand() -> None:
    """T (q - p) / N by the student's logits, which both the anchors and the other peer's candidates make."""
    o = options(alpha=0.0, beta=0.0, gamma=0.0, lam=1.0)
    live = leaves(drawn((1, 1)), torch.float64)
    a, b = (x.detach()[:, 0].numpy() for x in live)

    def share(x: np.ndarray) -> np.ndarray:
        return np.exp(x) / np.exp(x).sum(1, keepdims=True)

    z = a @ b.T / (0.1 * 3)
    by_logits = 3 * (share(z) - share(z.T)) / (0.1 * N)
    found = gradients(from_batch(live, None, o, {})[0, "soft_icl"], live)
    np.testing.assert_allclose(found[0][:, 0], by_logits @ b, rtol=1e-10)
    np.testing.assert_allclose(found[1][:, 0], by_logits.T @ a, rtol=1e-10)


# -- properties -------------------------------------------------------------------------------------------------------


def test_linear_in_the_weights() -> None:
    sizes, o = (3, 2), options()
    e = drawn(sizes)
    one, other = weights(sizes, N, seed=5), weights(sizes, N, seed=6)
    mixed = {pair: 0.3 * one[pair] + 2 * other[pair] for pair in one}
    for place, arguments in ((from_batch, (None,)), (from_memory, ())):
        found = [place(e, *arguments, o, w) for w in (one, other, mixed)]
        for key in found[0]:
            assert (0.3 * found[0][key] + 2 * found[1][key]).item() == pytest.approx(found[2][key].item(), rel=1e-12)


def test_exchanging_the_peers_exchanges_their_terms() -> None:
    sizes, o = (3, 2), options()
    (a, b), w = drawn(sizes), weights(sizes, N)
    turned = {(1 - i, 1 - j): x for (i, j), x in w.items()}
    one, other = from_batch([a, b], None, o, w), from_batch([b, a], None, o, turned)
    for i, name in one:
        assert one[i, name].item() == pytest.approx(other[1 - i, name].item(), rel=1e-12)


def test_permuting_the_batch_changes_nothing() -> None:
    sizes, o = (3, 2), options()
    e, w, y = drawn(sizes), weights(sizes, N), CLASSES[:N]
    order = torch.tensor([3, 0, 5, 1, 4, 2])
    shuffled = [x[order] for x in e]
    mixed = {pair: x[..., order] for pair, x in w.items()}
    one = totals(rows_in_batch([0, 1], by_size(e), by_size(e), y, o), w, o)
    other = totals(rows_in_batch([0, 1], by_size(shuffled), by_size(shuffled), y[order], o), mixed, o)
    for key in one:
        assert one[key].item() == pytest.approx(other[key].item(), rel=1e-11)


def test_rotations() -> None:
    """Of both peers alike nothing changes; of one alone all that is contrasted across peers does, and nothing else."""
    a, b = drawn((2, 2))
    turn = torch.tensor(np.linalg.qr(np.random.default_rng(0).normal(size=(D, D)))[0])
    y = CLASSES[:N]
    as_is, both, one = plain([a, b], y), plain([a @ turn, b @ turn], y), plain([a, b @ turn], y)
    assert both == pytest.approx(as_is, rel=1e-10)
    for name in NAMES:
        assert (one[name] == pytest.approx(as_is[name], rel=1e-10)) == ("vcl" in name)


def test_a_constant_of_each_row_changes_nothing() -> None:
    rng = np.random.default_rng(0)
    z, u = (torch.tensor(rng.normal(size=(2, N, N))) for _ in range(2))
    shift = torch.tensor(rng.normal(size=(2, N, 1)))
    torch.testing.assert_close(contrast(z + shift, CLASSES[:N]), contrast(z, CLASSES[:N]), rtol=1e-12, atol=0)
    log = [(x / 3).log_softmax(-1) for x in (u, z, u + 5 * shift, z - shift)]
    torch.testing.assert_close(kl_of_all(*log[:2]), kl_of_all(*log[2:]), rtol=1e-10, atol=0)


def test_peers_that_agree_teach_nothing_and_others_something() -> None:
    a, b = drawn((1, 1))
    y = CLASSES[:N]
    for twin in (a, a.clone()):
        found = plain([a, twin], y)
        assert abs(found["soft_vcl"]) < 1e-12
        assert abs(found["soft_icl"]) < 1e-12
    assert min(plain([a, b], y)[name] for name in ("soft_vcl", "soft_icl")) > 1e-2


def test_large_logits_are_no_trouble() -> None:
    """exp(1 / 0.005) overflows float32."""
    found = plain([x.float() for x in drawn((1, 1))], CLASSES[:N], tau=0.005)
    exact = plain(drawn((1, 1)), CLASSES[:N], tau=0.005)
    assert found == pytest.approx(exact, rel=1e-5)


# -- pieces -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("place", ["batch", "more", "memory"])
def test_pieces_change_nothing(place: str) -> None:
    """Nor do they in the derivative of a gradient."""
    sizes, w = (2, 1), all_weights((2, 1), torch.float32)
    c = drawn(sizes, N + 4, seed=50) if place == "more" else []

    def found(chunk: int | None) -> tuple[Terms, list[Tensor], list[Tensor]]:
        live, o = leaves([*drawn(sizes), *c], torch.float32), options(chunk=chunk)
        own, others = live[:2], live[2:] or None
        terms = from_memory(own, o, w) if place == "memory" else from_batch(own, others, o, w)
        total = torch.stack(list(terms.values())).sum()
        return terms, gradients(total, live), along(total, live)

    whole, *derivatives = found(None)
    for chunk in (1, 2, 5):
        terms, *again = found(chunk)
        for key, term in terms.items():
            assert term.item() == pytest.approx(whole[key].item(), rel=1e-6), key
        for order, tolerance in ((0, 1e-6), (1, 2e-6)):
            for a, b in zip(again[order], derivatives[order], strict=True):
                assert_close(a, b, tolerance, f"derivative {order + 1}, {chunk} at a time")


def test_pieces_are_made_again_in_the_backward_pass() -> None:
    seen: list[slice] = []
    live = torch.linspace(0, 1, 5, requires_grad=True)

    def compute(rows: slice) -> dict[tuple[int, int], PairRows]:
        seen.append(rows)
        return {(0, 1): PairRows(*((live[rows] ** p)[None, None] for p in (1, 2, 3, 4)))}

    found = in_pieces(2, 5, compute)[0, 1]
    assert seen == [slice(0, 2), slice(2, 4), slice(4, 5)]
    for p, x in enumerate(vars(found).values(), 1):
        torch.testing.assert_close(x, (live**p)[None, None])
    torch.stack(list(vars(found).values())).sum().backward()
    assert sorted(rows.start for rows in seen) == [0, 0, 2, 2, 4, 4]
    torch.testing.assert_close(live.grad, sum(p * live.detach() ** (p - 1) for p in (1, 2, 3, 4)))
    seen.clear()
    in_pieces(5, 5, compute)
    assert seen == [slice(0, 5)]

"""L-MCL's hypergradient against unrolled steps, finite differences and whole matrices; and its outer step."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.func import functional_call

from losses import Progress
from losses.capabilities import OuterStep
from losses.lmcl import LMCL, hypergradient
from tests.losses.contrastive import (
    assert_close,
)
from tests.losses.test_lmcl import (
    CLASSES,
    IDS,
    PROGRESS,
    PUBLISHED,
    C,
    D,
    G,
    N,
    Shown,
    Y,
    classified,
    contrasted,
    lmcl,
    matching,
)
from tests.worlds import run_world

Objective = Callable[[Shown], Tensor]


def as_step(
    parameters: Mapping[int, Mapping[str, Tensor]],
    outer: Mapping[int, Sequence[str]],
    show: Callable[[Mapping[int, Mapping[str, Tensor]]], Shown],
    *,
    lr: float = 0.3,
    momentum: float = 0.9,
    decay: float | Mapping[int, Mapping[str, float]] = 0.0,
    progress: Progress = PROGRESS,
) -> OuterStep:
    if not isinstance(decay, Mapping):
        decay = {k: dict.fromkeys(own, decay) for k, own in parameters.items()}
    return OuterStep(
        parameters=parameters,
        outer=outer,
        show=show,
        average=lambda tensors: {k: list(own) for k, own in tensors.items()},
        weight=1.0,
        lr=lr,
        momentum=momentum,
        weight_decay=decay,
        targets=Y,
        progress=progress,
    )


class Small(nn.Module):
    """A peer, whose `match` is what the outer problem learns, and a parameter that no objective reaches."""

    def __init__(self) -> None:
        super().__init__()
        self.network = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2))
        self.match = nn.Linear(2, 2)
        self.unused = nn.Parameter(torch.ones(2))

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        e = self.network(x)
        return {"e": e, "match": self.match(e).tanh()}


def inner(shown: Shown) -> Tensor:
    """Weighted by what the outer problem learns, with paths through both peers."""
    a, b = shown
    w = (a["match"] * b["match"]).sum(1).sigmoid()
    return (w * (a["e"] - b["e"]).square().sum(1)).mean() + (w * a["e"].cos().sum(1)).mean()


def final(shown: Shown) -> Tensor:
    return sum(peer["e"].logsumexp(1).mean() - peer["e"][:, 0].mean() for peer in shown)


def small_problem(momentum: float = 0.9, decay: bool = True, seed: int = 0) -> OuterStep:
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        peers = [Small().double() for _ in range(2)]
        x = torch.randn(6, 3, dtype=torch.float64)
    named = {k: dict(peer.named_parameters()) for k, peer in enumerate(peers)}
    rng = np.random.default_rng(seed)
    rho = {k: {name: float(rng.uniform(0, 0.3)) if decay else 0.0 for name in own} for k, own in named.items()}
    outer = {k: [name for name in own if name.startswith("match")] for k, own in named.items()}

    def show(parameters: Mapping[int, Mapping[str, Tensor]]) -> Shown:
        return [functional_call(peer, dict(parameters[k]), (x,)) for k, peer in enumerate(peers)]

    return as_step(named, outer, show, momentum=momentum, decay=rho)


def chosen(outer: OuterStep) -> dict[int, dict[str, Tensor]]:
    return {k: {name: outer.parameters[k][name].detach() for name in names} for k, names in outer.outer.items()}


def unrolled(path: Sequence[Objective], last: Objective, outer: OuterStep, phi: Any) -> Tensor:
    """final(theta_T) as a function of phi, by a graph through all steps."""
    theta = {
        k: {name: p.detach().clone().requires_grad_() for name, p in own.items() if name not in phi[k]}
        for k, own in outer.parameters.items()
    }
    velocity = {k: {name: torch.zeros_like(p) for name, p in own.items()} for k, own in theta.items()}
    for f in path:
        value = f(outer.show({k: {**own, **phi[k]} for k, own in theta.items()}))
        flat = [p for own in theta.values() for p in own.values()]
        g = iter(torch.autograd.grad(value, flat, create_graph=True, allow_unused=True, materialize_grads=True))
        for k, own in theta.items():
            for name, p in own.items():
                velocity[k][name] = outer.momentum * velocity[k][name] + next(g) + outer.weight_decay[k][name] * p
        theta = {k: {name: p - outer.lr * velocity[k][name] for name, p in own.items()} for k, own in theta.items()}
    return last(outer.show({k: {**own, **phi[k]} for k, own in theta.items()}))


def by_unrolling(path: Sequence[Objective], last: Objective, outer: OuterStep) -> dict[int, list[Tensor]]:
    phi = {k: {name: p.clone().requires_grad_() for name, p in own.items()} for k, own in chosen(outer).items()}
    flat = [p for own in phi.values() for p in own.values()]
    # What phi does to the last objective directly is no part of it: the published one does not look at phi.
    found = iter(torch.autograd.grad(unrolled(path, last, outer, phi), flat, materialize_grads=True))
    return {k: [next(found) for _ in own] for k, own in phi.items()}


def assert_equal(found: Mapping[int, Sequence[Tensor]], expected: Mapping[int, Sequence[Tensor]], t: float) -> None:
    assert found.keys() == expected.keys()
    for k in expected:
        for i, (a, b) in enumerate(zip(found[k], expected[k], strict=True)):
            assert a.shape == b.shape
            assert_close(a, b, t, f"peer {k}, parameter {i}")


@pytest.mark.parametrize(("momentum", "decay"), [(0.9, True), (0.0, True), (0.9, False)])
@pytest.mark.parametrize("steps", [1, 2, 3])
def test_hypergradient_is_that_of_the_unrolled_steps(steps: int, momentum: float, decay: bool) -> None:
    outer, path = small_problem(momentum, decay), [inner] * steps + [final]
    found = hypergradient(path, final, outer)
    assert_equal(found, by_unrolling(path, final, outer), 1e-11)
    assert min(g.abs().max().item() for own in found.values() for g in own) > 1e-5


@pytest.mark.parametrize("steps", [1, 3])
def test_hypergradient_by_finite_differences(steps: int) -> None:
    outer, path = small_problem(seed=1), [inner] * steps + [final]
    found, phi, h = hypergradient(path, final, outer), chosen(outer), 1e-5
    for k, own in phi.items():
        for i, (name, p) in enumerate(own.items()):
            for place in np.ndindex(*p.shape):
                values = []
                for sign in (1, -1):
                    moved = p.clone()
                    moved[place] += sign * h
                    values.append(unrolled(path, final, outer, {**phi, k: {**own, name: moved}}).item())
                assert found[k][i][place].item() == pytest.approx((values[0] - values[1]) / (2 * h), rel=1e-6, abs=1e-9)


@pytest.mark.parametrize("published", [False, True])
def test_the_recursion_by_whole_matrices(published: bool) -> None:
    """A and B by hand, with Hessians; published: the weight decay that multiplies B is lost."""
    outer, path = small_problem(seed=2), [inner, inner, final]
    names = [(k, name) for k, own in outer.parameters.items() for name in own if name not in outer.outer[k]]
    learned = [(k, name) for k, own in outer.outer.items() for name in own]
    shapes = [outer.parameters[k][name].shape for k, name in (*names, *learned)]
    size = sum(outer.parameters[k][name].numel() for k, name in names)
    wd = torch.cat([outer.weight_decay[k][n] * torch.ones_like(outer.parameters[k][n]).flatten() for k, n in names])
    at = torch.cat([outer.parameters[k][name].detach().flatten() for k, name in (*names, *learned)])
    theta, phi = at[:size], at[size:]

    def of(f: Objective) -> Callable[[Tensor], Tensor]:
        def function(both: Tensor) -> Tensor:
            pieces = both.split([s.numel() for s in shapes])
            parameters: dict[int, dict[str, Tensor]] = {0: {}, 1: {}}
            for (k, name), piece, shape in zip((*names, *learned), pieces, shapes, strict=True):
                parameters[k][name] = piece.view(shape)
            return f(outer.show(parameters))

        return function

    def slope(f: Objective, theta: Tensor) -> Tensor:
        both = torch.cat([theta, phi]).requires_grad_()
        return torch.autograd.grad(of(f)(both), both)[0][:size]

    v, visited, lr, mu = torch.zeros_like(theta), [], outer.lr, outer.momentum
    for f in path:
        visited.append(theta)
        v = mu * v + slope(f, theta) + wd * theta
        theta = theta - lr * v
    a, b, total = slope(final, theta), torch.zeros_like(theta), torch.zeros_like(phi)
    for f, theta in zip(reversed(path), reversed(visited), strict=True):
        hessian = torch.autograd.functional.hessian(of(f), torch.cat([theta, phi]))
        c = b - lr * a
        total = total + hessian[size:, :size] @ c
        a, b = a * (1 - lr * wd) + (1.0 if published else wd) * b + hessian[:size, :size] @ c, mu * b - lr * mu * a
    found = hypergradient(path, final, outer, published=published)
    assert_close(torch.cat([g.flatten() for own in found.values() for g in own]), total, 1e-10)
    other = hypergradient(path, final, outer, published=not published)
    assert (torch.cat([g.flatten() for own in other.values() for g in own]) - total).abs().max() > 1e-4 * total.max()


def test_the_toy_problem_of_learning_what_and_where_to_transfer() -> None:
    """Ten steps from fixed numbers, whose result the authors of that recursion give to 4 digits; the published form of
    L-MCL is off by 47 %."""
    theta = {"a": torch.tensor([1.0, 3.0]), "b": torch.tensor([[-1.0, -2.0], [1.0, 0.0]])}
    parameters = {0: {**theta, "lambda": torch.zeros(2, 2)}}

    def objective(shown: Shown) -> Tensor:
        return shown[0]["a"].square().mean() + (shown[0]["lambda"] * shown[0]["b"].square()).sum()

    def last(shown: Shown) -> Tensor:
        return (shown[0]["a"] * shown[0]["b"]).mean()

    outer = as_step(parameters, {0: ["lambda"]}, lambda p: [p[0]], lr=0.1, momentum=0.9, decay=0.01)
    found = hypergradient([objective] * 10, last, outer)[0][0]
    np.testing.assert_allclose(found, [[-1.1952, -7.1712], [1.1952, 0.0]], atol=6e-5)
    published = hypergradient([objective] * 10, last, outer, published=True)[0][0]
    assert ((published - found).norm() / found.norm()).item() == pytest.approx(0.4737, abs=1e-4)


def test_nothing_is_left_behind() -> None:
    """Parameters as they were, bit by bit, and no gradient at them."""
    outer = small_problem()
    before = {k: {name: p.detach().clone() for name, p in own.items()} for k, own in outer.parameters.items()}
    hypergradient([inner, inner, final], final, outer)
    for k, own in outer.parameters.items():
        assert all(torch.equal(p, before[k][name]) and p.grad is None for name, p in own.items())


def _of_a_replica() -> dict[int, list[Tensor]]:
    whole = small_problem()
    rank = dist.get_rank()

    def average(tensors: Mapping[int, Sequence[Tensor]]) -> dict[int, list[Tensor]]:
        for own in tensors.values():
            for x in own:
                dist.all_reduce(x)
        return {k: [x / 2 for x in own] for k, own in tensors.items()}

    def show(parameters: Mapping[int, Mapping[str, Tensor]]) -> Shown:
        mine = slice(3 * rank, 3 * rank + 3)
        return [{name: x[mine] for name, x in peer.items()} for peer in whole.show(parameters)]

    found = hypergradient([inner, inner, final], final, replace(whole, show=show, average=average))
    return average({k: [x.clone() for x in own] for k, own in found.items()})


def test_replicas_with_half_of_the_rows_each_have_the_hypergradient_of_all() -> None:
    """All look ahead along the mean of their gradients, and the mean of what they find is what one rank does."""
    expected = hypergradient([inner, inner, final], final, small_problem())
    for found in run_world(2, _of_a_replica):
        assert_equal(found, expected, 1e-12)


# -- the outer step ---------------------------------------------------------------------------------------------------

SIZES, INPUTS, WIDE = (2, 3), 4, 3


def peers_with_exits(dtype: torch.dtype) -> tuple[dict[int, dict[str, Tensor]], Tensor]:
    """Parameters of peers whose exits are one layer each, and inputs [G, .]."""
    rng = np.random.default_rng(4)
    parameters = {
        k: {
            name: torch.tensor(rng.normal(size=shape)).float().to(dtype)
            for name, shape in (
                ("network.weight", (s, WIDE, INPUTS)),
                ("head.classifier", (s, C, WIDE)),
                ("head.embed", (s, D, WIDE)),
                ("head.match.weight", (s, 6, WIDE)),
            )
        }
        for k, s in enumerate(SIZES)
    }
    return parameters, torch.tensor(rng.normal(size=(G, INPUTS))).float().to(dtype)


def shown_by(method: LMCL, x: Tensor, parameters: Mapping[int, Mapping[str, Tensor]]) -> Shown:
    def unit(x: Tensor) -> Tensor:
        return x / x.norm(dim=-1, keepdim=True)

    shown: list[dict[str, Tensor]] = []
    for own in parameters.values():
        f = torch.einsum("ng,sfg->nsf", x, own["network.weight"]).tanh()
        e = unit(torch.einsum("nsf,sdf->nsd", f, own["head.embed"]))
        exits = torch.einsum("nsf,scf->nsc", f, own["head.classifier"])
        match = unit(torch.einsum("nsf,sdf->nsd", f, own["head.match.weight"]))
        signals = {"exits": exits[:N], "logits": exits[:N, -1], "embeddings": e[:N], "match": match[:N]}
        if method.everywhere:
            signals |= {"all_embeddings": e, "all_targets": CLASSES[IDS], "all_ids": IDS}
        shown.append(signals)
    return shown


def an_outer_step(method: LMCL, dtype: torch.dtype, progress: Progress = PROGRESS) -> OuterStep:
    parameters, x = peers_with_exits(dtype)
    outer = {k: ["head.match.weight"] for k in parameters}
    return as_step(parameters, outer, partial(shown_by, method, x), lr=0.05, decay=0.02, progress=progress)


@pytest.mark.parametrize(
    ("options", "steps"),
    [({"negatives": "batch"}, 1), ({"negatives": "batch"}, 2), ({"negatives": "global", "chunk": 2}, 1),
     ({"negatives": "memory", "chunk": 2}, 1), (PUBLISHED, 1)],
)  # fmt: skip
def test_the_outer_step(options: dict[str, Any], steps: int) -> None:
    """Look-ahead on the contrastive losses alone, where weights carry a gradient to phi and, through the features, to
    theta; then a step on the exits' cross-entropies, whose value at the end is what counts."""
    method = lmcl(2, inner_steps=steps, **options)

    def f_in(shown: Shown) -> Tensor:
        return sum(contrasted(method, shown, matching(shown)).values())

    def f_out(shown: Shown) -> Tensor:
        return sum(classified(peer["exits"]) for peer in shown)

    exact = an_outer_step(method, torch.float64)
    expected = by_unrolling([f_in] * steps + [f_out], f_out, exact)
    found = method.outer_step(an_outer_step(method, torch.float32))
    assert found is not None
    assert_equal(found, expected, 1e-4)


def test_the_outer_step_as_published() -> None:
    method, published = lmcl(2, negatives="batch"), lmcl(2, negatives="batch", hypergradient="published")
    one, other = (m.outer_step(an_outer_step(m, torch.float32)) for m in (method, published))
    assert one is not None
    assert other is not None
    difference = max((a - b).norm() / a.norm() for k in one for a, b in zip(one[k], other[k], strict=True))
    assert 1e-5 < difference < 0.5


@pytest.mark.parametrize(("steps_per_epoch", "interval", "count"), [(390, 50, 8), (5005, 500, 11), (390, None, 0)])
def test_when_an_outer_step_is_due(steps_per_epoch: int, interval: int | None, count: int) -> None:
    """At the first step of each epoch, and every `interval` after it."""
    method = lmcl(2, meta_interval=interval, negatives="batch", inner_steps=1)
    outer = an_outer_step(method, torch.float32)
    epoch = range(steps_per_epoch, 2 * steps_per_epoch)
    due = [step for step in epoch if _due(method, replace(outer, progress=Progress(step, steps_per_epoch, 3)))]
    assert [step - steps_per_epoch for step in due] == [(interval or 0) * i for i in range(count)]


def _due(method: LMCL, outer: OuterStep) -> bool:
    """Whether the peers are looked at: an outer step that is not due looks at nothing."""

    class Looked(Exception):  # noqa: N818
        pass

    def show(parameters: object) -> Shown:
        raise Looked

    try:
        found = method.outer_step(replace(outer, show=show))
    except Looked:
        return True
    assert found is None
    return False

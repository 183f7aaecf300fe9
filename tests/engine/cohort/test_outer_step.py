"""L-MCL's outer step on real ranks: the gradient of a plain unrolled computation, and what it leaves alone."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.func import functional_call

from data_pipelines import Batch
from engine.cohort.outer_step import outer_gradients
from engine.config import RunConfig
from engine.training.step import _outer_update
from losses import Progress
from tests.engine.stepping import (
    STEPS_PER_EPOCH,
    batches,
    cohort_in_double,
    cohort_of,
    config_of,
    do_steps,
    global_batch,
    joined,
    optimizer_state,
    state,
)
from tests.marks import slow
from tests.worlds import run_world

ALPHA, BETA, GAMMA, LAMBDA, TAU, T = 0.1, 0.2, 1.0, 0.5, 0.1, 3.0
RATE, MOMENTUM, DECAY = 0.05, 0.9, 0.02
STEP = 2
UNLIKE = [{"network": "cifar_resnet8_b", "options": {"width": 4}}, {"network": "cifar_wrn_16_1"}]


def a_config(negatives: str, peers: Any, placement: dict[str, Any], **options: Any) -> RunConfig:
    method = {
        "name": "lmcl",
        "negatives": negatives,
        "meta_interval": 2,
        "width": 16,
        "alpha": ALPHA,
        "beta": BETA,
        "gamma": GAMMA,
        "lam": LAMBDA,
        "tau": TAU,
        "temperature": T,
        **options,
    }
    optimizer = {"lr": RATE, "momentum": MOMENTUM, "weight_decay": DECAY, "decay_norm_and_bias": False}
    return config_of(method, peers, placement=placement, optimizer=optimizer)


def found_by_the_engine(config: RunConfig) -> dict[str, Tensor]:
    """The gradients of this rank's outer parameters, after a step has moved everything from where it began."""
    cohort = cohort_in_double(config)
    do_steps(cohort, [1])
    for optimizer in cohort.optimizers():
        optimizer.zero_grad()
    [(_, [batch])] = batches(cohort, [STEP])
    assert outer_gradients(cohort, batch, cohort.shares[-1], Progress(STEP, STEPS_PER_EPOCH, 2))
    return {f"{k}/{n}": p.grad for k, r in cohort.residents.items() for n, p in r.outer.items() if p.grad is not None}


# -- the same in plain PyTorch ----------------------------------------------------------------------------------------


def hard(z: Tensor, w: Tensor, classes: Tensor, own: Tensor) -> Tensor:
    """Section 1.2 of the specification; row n's own column is own[n], and a row without positives counts 0."""
    total = []
    for n in range(len(z)):
        others = [g for g in range(z.shape[1]) if g != own[n]]
        positives = [g for g in others if classes[g] == classes[own[n]]]
        log_sum = z[n, others].exp().sum().log()
        total.append(-w[n] * (z[n, positives] - log_sum).mean() if positives else w[n] * 0)
    return torch.stack(total).mean()


def soft(z: Tensor, teacher: Tensor, w: Tensor) -> Tensor:
    """Section 1.3."""
    p, q = (teacher.detach() / T).softmax(1), (z / T).softmax(1)
    return T**2 * (w * (p * (p.log() - q.log())).sum(1)).mean()


def pair(a: Tensor, b: Tensor, rows: Tensor, w: Tensor, classes: Tensor) -> Tensor:
    """Section 1.4, of embeddings [G, d] of all candidates, for the anchors in `rows`."""
    aa, bb, ab, ba = (x[rows] @ y.T / TAU for x, y in ((a, a), (b, b), (a, b), (b, a)))
    return (
        ALPHA * (hard(aa, w, classes, rows) + hard(bb, w, classes, rows))
        + GAMMA * (soft(aa, bb, w) + soft(bb, aa, w))
        + BETA * (hard(ab, w, classes, rows) + hard(ba, w, classes, rows))
        + LAMBDA * (soft(ab, ba, w) + soft(ba, ab, w))
    )


def in_one_graph(config: RunConfig, replicas: int) -> dict[str, Tensor]:
    """All of it, for the rows of all replicas, on this rank alone and as one function of phi, differentiated by
    autograd through all look-ahead steps.

    Args:
        config: of a colocated cohort on `replicas` ranks, which take a step together first.
        replicas: in how many shares BatchNorm sees the rows.
    """
    cohort = cohort_in_double(config)
    assert cohort.placement.replicas == replicas
    do_steps(cohort, [1])
    batch = global_batch(config, STEP)
    shares = torch.arange(len(batch.targets)).chunk(replicas)
    peers = {k: r.peer for k, r in cohort.residents.items()}
    names = {k: list(r.outer) for k, r in cohort.residents.items()}
    phi = {k: {n: p.detach().clone().requires_grad_() for n, p in r.outer.items()} for k, r in cohort.residents.items()}
    theta = {
        k: {n: p.detach().clone().requires_grad_() for n, p in peer.named_parameters() if n not in names[k]}
        for k, peer in peers.items()
    }

    def show(at: dict[int, dict[str, Tensor]]) -> list[list[dict[str, Tensor]]]:
        """Of each share of the rows, what each peer shows."""
        return [
            [
                functional_call(
                    peers[k],
                    {**at[k], **phi[k], **{n: b.clone() for n, b in peers[k].named_buffers()}},
                    (batch.images[rows],),
                )
                for k in peers
            ]
            for rows in shares
        ]

    def inner(at: dict[int, dict[str, Tensor]]) -> Tensor:
        shown = show(at)
        per_rank = cohort.method.options.negatives == "batch"
        total = torch.zeros(())
        for share, rows in enumerate(shares):
            seen = [shown[share]] if per_rank else shown
            classes = batch.targets[rows] if per_rank else batch.targets
            here = torch.arange(len(rows)) if per_rank else rows
            for i in peers:
                for j in peers:
                    exits = [shown[share][k]["exits"].shape[1] for k in (i, j)]
                    for k in range(exits[0]) if i != j else ():
                        for z in range(exits[1]):
                            a, b = (torch.cat([s[p]["embeddings"][:, e] for s in seen]) for p, e in ((i, k), (j, z)))
                            match = shown[share][i]["match"][:, k], shown[share][j]["match"][:, z]
                            w = torch.cosine_similarity(*match, dim=1).sigmoid()
                            total = total + pair(a, b, here, w, classes) / replicas
        return total

    def outermost(at: dict[int, dict[str, Tensor]]) -> Tensor:
        total = torch.zeros(())
        for share, rows in zip(show(at), shares, strict=True):
            for own in share:
                for z in own["exits"].unbind(1):
                    total = total + torch.nn.functional.cross_entropy(z, batch.targets[rows]) / replicas
        return total

    velocity = {k: {n: torch.zeros_like(p) for n, p in own.items()} for k, own in theta.items()}
    for f in (inner, inner, outermost):
        flat = [p for own in theta.values() for p in own.values()]
        gradients = iter(torch.autograd.grad(f(theta), flat, create_graph=True, materialize_grads=True))
        for own in velocity.values():
            for n in own:
                own[n] = MOMENTUM * own[n] + next(gradients)
        for k, own in theta.items():
            for n, p in own.items():
                # Biases and norms do not decay.
                velocity[k][n] = velocity[k][n] + (DECAY * p if p.ndim > 1 else 0)
        theta = {k: {n: p - RATE * velocity[k][n] for n, p in own.items()} for k, own in theta.items()}
    flat_phi = [p for own in phi.values() for p in own.values()]
    gradients = torch.autograd.grad(outermost(theta), flat_phi)
    return dict(zip([f"{k}/{n}" for k, own in phi.items() for n in own], gradients, strict=True))


PLAIN: dict[str, dict[str, Tensor]] = {}


def plain(negatives: str, peers: Any, replicas: int) -> dict[str, Tensor]:
    key = repr((negatives, peers, replicas))
    if key not in PLAIN:
        config = a_config(negatives, peers, {"kind": "colocated"})
        PLAIN[key] = run_world(replicas, in_one_graph, config, replicas)[0]
    return PLAIN[key]


@pytest.mark.parametrize(
    ("negatives", "peers", "replicas", "ranks", "placement"),
    [
        ("batch", 2, 1, 1, {"kind": "colocated"}),
        ("batch", 2, 1, 2, {"kind": "spread"}),
        slow("batch", UNLIKE, 1, 1, {"kind": "colocated"}),
        slow("batch", UNLIKE, 1, 2, {"kind": "spread"}),
        slow("batch", 2, 2, 2, {"kind": "colocated"}),
        slow("batch", 2, 2, 4, {"kind": "spread"}),
        slow("global", 2, 2, 2, {"kind": "colocated"}),
        ("global", 2, 2, 4, {"kind": "spread"}),
        slow("batch", 3, 1, 3, {"kind": "spread"}),
    ],
    ids=str,
)
def test_gradient_is_that_of_the_unrolled_steps(
    negatives: str, peers: Any, replicas: int, ranks: int, placement: dict[str, Any]
) -> None:
    expected = plain(negatives, peers, replicas)
    found = joined(run_world(ranks, found_by_the_engine, a_config(negatives, peers, placement)))
    assert found.keys() == expected.keys()
    assert all("head.match." in name for name in found)
    for name, gradient in expected.items():
        assert gradient.norm() > 0
        assert (found[name] - gradient).norm() <= 1e-9 * gradient.norm(), name


def test_more_inner_steps_are_another_gradient() -> None:
    """What is compared above depends on the path."""
    [two] = run_world(1, found_by_the_engine, a_config("batch", 2, {"kind": "colocated"}))
    [one] = run_world(1, found_by_the_engine, a_config("batch", 2, {"kind": "colocated"}, inner_steps=1))
    for name, gradient in two.items():
        assert (one[name] - gradient).norm() > 1e-3 * gradient.norm()


# -- what it leaves alone ---------------------------------------------------------------------------------------------

Seen = tuple[dict[str, Tensor], dict[str, Tensor]]


def around_an_outer_step(config: RunConfig) -> tuple[Seen, Seen]:
    """This rank's peers, and what all optimisers remember, before and after an outer step of its own."""
    cohort = cohort_of(config)
    do_steps(cohort, [0, 1])
    [(_, [batch])] = batches(cohort, [STEP])
    before = state(cohort), optimizer_state(cohort)
    assert outer_gradients(cohort, batch, cohort.shares[-1], Progress(STEP, STEPS_PER_EPOCH, 2))
    _outer_update(cohort, torch.zeros(1))
    return before, (state(cohort), optimizer_state(cohort))


@pytest.mark.parametrize(("ranks", "kind"), [slow(1, "colocated"), (2, "spread"), (2, "colocated")])
@pytest.mark.parametrize("negatives", [slow("global"), "memory"])
def test_an_outer_step_leaves_everything_but_its_own_alone(negatives: str, ranks: int, kind: str) -> None:
    for (state_0, remembered_0), (state_1, remembered_1) in run_world(
        ranks, around_an_outer_step, a_config(negatives, 2, {"kind": kind})
    ):
        moved = {name for name, x in state_1.items() if not torch.equal(x, state_0[name])}
        assert moved == {name for name in state_1 if ".match." in name}
        assert any("running_mean" in name for name in state_1)
        residents = len({name[0] for name in state_1 if name[0].isdigit()})
        # Optimisers come in order: of each resident, then those of outer steps.
        for name, x in remembered_1.items():
            assert torch.equal(x, remembered_0[name]) == (int(name.split("/")[0]) < residents), name


def matches_after(config: RunConfig, steps: Sequence[int]) -> list[dict[str, Tensor]]:
    cohort = cohort_of(config)
    seen = []
    for step in steps:
        do_steps(cohort, [step])
        seen.append({name: x for name, x in state(cohort).items() if ".match." in name})
    return seen


def test_the_projections_move_in_outer_steps_alone_counted_from_the_start_of_an_epoch() -> None:
    """Epochs of 5 steps: due are 0, 2, 4 and then 5, 7."""
    for seen in run_world(2, matches_after, a_config("global", 2, {"kind": "spread"}), range(8)):
        moved = [any(not torch.equal(x, seen[i][n]) for n, x in seen[i + 1].items()) for i in range(7)]
        assert [step for step, has in enumerate(moved, 1) if has] == [2, 4, 5, 7]


def test_without_an_interval_they_stay_as_they_are() -> None:
    first, last = run_world(1, matches_after, a_config("batch", 2, {}, meta_interval=None), [0, 1])[0]
    assert all(torch.equal(x, last[name]) for name, x in first.items())


def around_a_broken_outer_step(config: RunConfig, broken: int) -> tuple[Seen, Seen]:
    cohort = cohort_of(config)
    do_steps(cohort, [0, 1])
    [(_, [batch])] = batches(cohort, [STEP])
    before = state(cohort), optimizer_state(cohort)
    if cohort.placement.rank == broken:
        batch = Batch((batch.images * torch.nan,), batch.targets, batch.ids)
    assert outer_gradients(cohort, batch, cohort.shares[-1], Progress(STEP, STEPS_PER_EPOCH, 2))
    _outer_update(cohort, torch.zeros(1))
    return before, (state(cohort), optimizer_state(cohort))


@pytest.mark.parametrize("kind", ["spread", "colocated"])
def test_one_rank_with_a_non_finite_number_leaves_the_projections_alone_everywhere(kind: str) -> None:
    for before, after in run_world(2, around_a_broken_outer_step, a_config("batch", 2, {"kind": kind}), 1):
        for one, other in zip(before, after, strict=True):
            assert all(torch.equal(x, one[name]) for name, x in other.items())

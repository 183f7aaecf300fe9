"""What the engine is timed against does the same work: the plain trainer's losses and gradients are ours, for the same
weights and images. And the benches that compare them run."""

from __future__ import annotations

from argparse import Namespace
from collections.abc import Sequence
from contextlib import redirect_stdout
from io import StringIO
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from data_pipelines import Batch
from engine.cohort.cohort import Cohort
from engine.cohort.outer_step import outer_gradients
from engine.ranks.collectives import Launch
from launch.bench.peers import Workload, bench_cohort
from launch.bench.plain import contrast, objectives
from launch.bench.plain.comparing import CASES, print_outer
from launch.bench.plain.networks import Shape
from launch.bench.plain.objectives import Objective
from launch.bench.whole import whole_steps
from losses import Progress
from tests.worlds import run_world

CPU = torch.device("cpu")
SHAPE = Shape("cifar_resnet8_b", 4, 16)
# Each class twice: the published contrastive losses have no answer for an image without a class mate.
TARGETS = torch.tensor([0, 1, 2, 3, 0, 1, 2, 3])
LOOK_AHEAD = 0.001
HALFWAY = 40
"""The epoch: ramps over 80 epochs are between their ends."""


def take(plain: nn.Module, *ours: nn.Module) -> None:
    """Copies weights and buffers, in their order."""
    there = [x for module in ours for x in module.state_dict().values()]
    for mine, x in zip(plain.state_dict().values(), there, strict=True):
        assert mine.shape == x.shape
        mine.copy_(x)


def take_all(plain: Objective, cohort: Cohort) -> None:
    """The plain trainer goes on with the cohort's weights."""
    peers = [cohort.residents[k].peer for k in range(plain.peers)]
    for k, peer in enumerate(peers):
        if isinstance(plain, objectives.Branched):
            take(plain.net.branches[k], peer.network)
        else:
            network = plain.networks[k]
            take(getattr(network, "network", network), peer.network)
        if isinstance(plain, objectives.DCM):
            take(plain.networks[k].exits, peer.head.ep1, peer.head.ep2)
        if isinstance(plain, contrast.MCL):
            take(plain.embed[k], peer.head.projection)
        if isinstance(plain, contrast.LMCL):
            take(plain.networks[k].exits, peer.head.auxiliary)
            take(plain.gates[k], peer.head.gate)
            for s in range(plain.exits):
                take(plain.embed[k * plain.exits + s], peer.head.projections[s])
                take(plain.match[k * plain.exits + s], peer.head.match[s])
    if isinstance(plain, objectives.Branched):
        take(plain.net.trunk, cohort.trunk.module)
    for name in ("gate", "fusion", "query", "key", "ensemble"):
        if hasattr(plain, name) and not isinstance(plain, contrast.LMCL):
            take(getattr(plain, name), getattr(cohort.method, name))
    if isinstance(plain, objectives.PCL):
        take(plain.ema, plain.net)
    if isinstance(plain, objectives.Codistillation):
        plain.after([], TARGETS, 9)
        for mine, copy in zip(cohort.method.copies, plain.copies, strict=True):
            take(mine, copy)
        cohort.method.set_extra_state(torch.ones(plain.peers, dtype=torch.bool))


Pairs = dict[str, tuple[Tensor, Tensor]]


def gradients(module: nn.Module) -> Tensor:
    return torch.cat([p.grad.flatten() for p in module.parameters() if p.grad is not None])


def both(name: str) -> Pairs:
    """What is to be equal, the plain trainer's and ours."""
    case = CASES[name]
    torch.manual_seed(5)
    plain = case.plain(SHAPE, case.peers).train()
    work = Workload(
        SHAPE.network, SHAPE.size, len(TARGETS), peers=case.peers, method=case.method, classes=4, views=case.views
    )
    cohort = bench_cohort(work, CPU, Launch(0, 0, 1))
    with torch.no_grad():
        take_all(plain, cohort)
    images = [torch.randn(len(TARGETS), 3, SHAPE.size, SHAPE.size) for _ in range(plain.views)]
    batch, progress = Batch(tuple(images), TARGETS, torch.arange(len(TARGETS))), Progress(1000 * HALFWAY, 1000, 100)

    mine = plain.losses(images, TARGETS, HALFWAY)
    for loss in mine:
        loss.backward()
    signals = cohort.share(cohort.forward(batch, progress, 0, range(case.peers)), batch, cohort.shares[0])
    terms = cohort.objective(range(case.peers), signals, TARGETS, progress, 0)
    loss = torch.stack(list(terms.values())).sum()
    loss.backward()
    found = {"loss": (torch.stack(mine).sum().detach(), loss.detach())}
    nets: Sequence[Any] = plain.net.branches if isinstance(plain, objectives.Branched) else plain.networks
    for k, network in enumerate(nets):
        own = getattr(network, "network", network)
        found[f"peer {k}"] = gradients(own), gradients(cohort.residents[k].peer.network)
    if isinstance(plain, objectives.Branched):
        found["trunk"] = gradients(plain.net.trunk), gradients(cohort.trunk.module)
    if name == "lmcl-outer":
        # At the rate of training a look-ahead step is so large that float32 ends up beyond other kinks of the ReLUs.
        for optimizer in cohort.optimizers():
            optimizer.param_groups[0]["lr"] = LOOK_AHEAD
        assert outer_gradients(cohort, batch, cohort.shares[0], progress)
        outer = [p.grad for r in cohort.residents.values() for p in r.outer.values()]
        looked_ahead = plain.outer_gradients(images[0], TARGETS, LOOK_AHEAD)
        found["outer"] = tuple(torch.cat([x.flatten() for x in each]) for each in (looked_ahead, outer))
    return found


def all_of_them(names: Sequence[str]) -> dict[str, Pairs]:
    return {name: both(name) for name in names}


NAMES = [name for name in CASES if name not in ("dml-4", "dml-8")]


@pytest.fixture(scope="module")
def found() -> dict[str, Pairs]:
    return run_world(1, all_of_them, NAMES)[0]


@pytest.mark.parametrize("name", NAMES)
def test_the_plain_trainer_learns_by_the_same_gradients(name: str, found: dict[str, Pairs]) -> None:
    for what, (plain, ours) in found[name].items():
        assert plain.norm() > 0
        assert (plain - ours).norm() <= 2e-4 * ours.norm(), what


def printed(what: str, cases: Sequence[str]) -> str:
    options = Namespace(
        what=what, cases=cases, quick=True, rounds=2, steps=1, batch=8, workers=0, peers=2, classes=4, size=None
    )
    options.network, options.amp, options.compile = "cifar_resnet8_b", "float32", False
    with redirect_stdout(StringIO()) as out:
        whole_steps(options, CPU, Launch(0, 0, 1))
    return out.getvalue()


def test_methods_are_timed_against_independent_peers() -> None:
    [lines] = run_world(1, printed, "methods", ["dml", "pcl", "lmcl, no outer step"])
    _, dml, pcl, lmcl = lines.splitlines()
    assert " of independent (quartiles " in dml
    assert "extra networks" not in dml
    assert "; extra networks " in pcl
    assert "; extra networks " in lmcl


@pytest.mark.slow
def test_whole_steps_are_timed_against_the_plain_trainer() -> None:
    [lines] = run_world(1, printed, "peers", ["dml-4", "kdcl"])
    assert lines.count(" times as fast (quartiles ") == 2


def test_an_outer_step_is_told_from_the_step_around_it(capsys: pytest.CaptureFixture[str]) -> None:
    print_outer({"ours": [1.0, 1.0], "plain": [2.0, 2.0]}, {"ours": [2.0, 2.0], "plain": [5.0, 5.0]})
    alone, every = capsys.readouterr().out.splitlines()
    assert "3.00 times as fast" in alone  # (5 - 2) / (2 - 1)
    assert "2.02 times as fast" in every  # (2 + 3 / 50) / (1 + 1 / 50)


def test_a_case_that_does_not_exist_is_refused() -> None:
    with pytest.raises(RuntimeError, match="nearest: 'okddip'"):
        run_world(1, printed, "peers", ["okdip"])

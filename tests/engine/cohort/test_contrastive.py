"""MCL and L-MCL on real ranks: negatives of the whole global batch, promise 1 with outer steps and memory banks, what
travels."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.modules.batchnorm import _BatchNorm

from data_pipelines import Batch
from engine.cohort.cohort import Cohort
from engine.config import RunConfig
from engine.ranks.tables import ShardedTable, WholeTable
from engine.training.step import train_step
from engine.training.timing import Clock
from losses import Progress
from tests.engine.ranks.exchanging.test_exchange import ROWS
from tests.engine.stepping import (
    CPU,
    STEPS_PER_EPOCH,
    cohort_in_double,
    cohort_of,
    config_of,
    do_steps,
    global_batch,
    joined,
    state,
)
from tests.marks import often, slow
from tests.runs import assert_same_weights
from tests.worlds import run_world

WIDTH = 16
MEMORY = {"negatives": "memory", "positives": 2, "num_negatives": 24}
FORMS: dict[str, dict[str, Any]] = {
    "mcl_batch": {"name": "mcl", "negatives": "batch"},
    "mcl_global": {"name": "mcl", "negatives": "global"},
    "mcl_memory": {"name": "mcl", **MEMORY},
    "mcl_shared_negatives": {"name": "mcl", **MEMORY, "shared_negatives": True, "chunk": 4},
    "mcl_distilling": {"name": "mcl", "logit_distill": "last", "chunk": 5},
    "lmcl_batch": {"name": "lmcl", "negatives": "batch"},
    "lmcl_global": {"name": "lmcl", "negatives": "global"},
    "lmcl_memory": {"name": "lmcl", **MEMORY},
}


MAIN = ("mcl_global", "mcl_memory", "lmcl_global", "lmcl_memory")
HYBRID = {"kind": "hybrid", "peers_per_rank": 2}
UNLIKE = [{"network": "cifar_resnet8_b", "options": {"width": 4}}, {"network": "cifar_wrn_16_1"}]
STEPS = [0, 1, 2, 0, 1]
"""Outer steps are due in three of them, and images are seen a second time."""


def a_config(form: str, peers: Any, placement: dict[str, Any], **options: Any) -> RunConfig:
    method = {**FORMS[form], "width": WIDTH, **options}
    if method["name"] == "lmcl":
        method.setdefault("meta_interval", 2)
    sections = {"train": {"accumulation": method.pop("accumulation", 1)}}
    return config_of(method, peers, placement=placement, **sections).model_copy(update={"seed": 3})


def banks(cohort: Cohort) -> dict[str, Tensor]:
    """All rows of all tables, as this rank reads them; every rank must call it."""
    tables = [(n, m) for n, m in cohort.method.named_modules() if isinstance(m, WholeTable | ShardedTable)]
    return {f"method/{name}.rows": table.read(torch.arange(table.size)) for name, table in tables}


def run(config: RunConfig, steps: list[int], double: bool) -> dict[str, Tensor]:
    """Every tensor of this rank's peers with their heads, what outer steps remember, and the banks."""
    cohort = cohort_in_double(config) if double else cohort_of(config)
    do_steps(cohort, steps)
    cohort.average_buffers()
    tensors = state(cohort) | banks(cohort)
    for k, resident in cohort.residents.items():
        if resident.outer_optimizer is not None:
            remembered = resident.outer_optimizer.state_dict()["state"]
            tensors |= {f"{k}/outer/{i}": x["momentum_buffer"].clone() for i, x in remembered.items()}
    assert not double or all(x.dtype != torch.float32 for x in tensors.values())
    return tensors


DONE: dict[str, dict[str, Tensor]] = {}


def trained(form: str, peers: Any, ranks: int, placement: dict[str, Any], double: bool = True, **options: Any) -> Any:
    """All ranks' tensors as one; what several ranks hold, banks and outer parameters too, must be the same bits."""
    key = repr((form, peers, ranks, placement, double, options))
    if key not in DONE:
        config = a_config(form, peers, placement, **options)
        # In float32 a unit that is about to turn over makes of 1e-6 a percent within a few steps.
        DONE[key] = joined(run_world(ranks, run, config, STEPS if double else STEPS[:3], double))
    return DONE[key]


COLOCATED, SPREAD = {"kind": "colocated"}, {"kind": "spread"}


# -- promise 1 --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("form", often(FORMS, *MAIN, "mcl_distilling"))
def test_two_peers_spread_equal_colocated(form: str) -> None:
    expected = trained(form, 2, 1, COLOCATED)
    assert_same_weights(trained(form, 2, 2, SPREAD), expected, 1e-10)
    assert any("/outer/" in name for name in expected) == form.startswith("lmcl")
    assert any(name.startswith("method/memory.banks") for name in expected) == ("memory" in FORMS[form].values())


@pytest.mark.parametrize("form", often(MAIN, "lmcl_memory"))
def test_in_float32_too(form: str) -> None:
    assert_same_weights(trained(form, 2, 2, SPREAD, False), trained(form, 2, 1, COLOCATED, False), 1e-5)


@pytest.mark.parametrize("form", [slow("mcl_global"), "mcl_memory", slow("lmcl_global"), slow("lmcl_memory")])
def test_three_peers_spread_equal_colocated(form: str) -> None:
    assert_same_weights(trained(form, 3, 3, SPREAD), trained(form, 3, 1, COLOCATED), 1e-10)


@pytest.mark.parametrize("form", ["mcl_memory", slow("lmcl_global")])
def test_four_peers_in_a_hybrid_equal_colocated(form: str) -> None:
    assert_same_weights(trained(form, 4, 2, HYBRID), trained(form, 4, 1, COLOCATED), 1e-10)


@pytest.mark.parametrize(
    "form",
    [slow("mcl_batch"), slow("mcl_global"), "mcl_memory", "lmcl_batch", slow("lmcl_global"), slow("lmcl_memory")],
)
def test_spread_over_replicas_equals_colocated_over_as_many(form: str) -> None:
    """Two replicas on either side, so that BatchNorm sees the same rows."""
    assert_same_weights(trained(form, 2, 4, SPREAD), trained(form, 2, 2, COLOCATED), 1e-10)


@pytest.mark.parametrize("form", ["mcl_global", slow("mcl_memory"), slow("lmcl_global")])
def test_replicas_of_a_hybrid_equal_as_many_of_everything(form: str) -> None:
    assert_same_weights(trained(form, 4, 4, HYBRID), trained(form, 4, 2, COLOCATED), 1e-10)


@pytest.mark.parametrize("negatives", ["global", slow("memory")])
def test_a_shared_trunk_of_four_branches(negatives: str) -> None:
    form = f"mcl_{negatives}"
    colocated = trained(form, 4, 1, COLOCATED, shared_stages=1)
    assert_same_weights(trained(form, 4, 4, SPREAD, shared_stages=1), colocated, 1e-10)
    assert_same_weights(trained(form, 4, 2, HYBRID, shared_stages=1), colocated, 1e-10)


@pytest.mark.parametrize("form", ["mcl_memory", slow("mcl_global"), slow("lmcl_global"), slow("lmcl_memory")])
def test_unlike_peers(form: str) -> None:
    assert_same_weights(trained(form, UNLIKE, 2, SPREAD), trained(form, UNLIKE, 1, COLOCATED), 1e-10)


def test_forms_differ() -> None:
    """The equalities above would hold for methods that do nothing, too."""
    runs = {form: trained(form, 2, 1, COLOCATED) for form in FORMS}
    for form, one in runs.items():
        for other in [name for name in runs if name < form]:
            # On one rank the rows of the rank are those of the global batch.
            same = form.removesuffix("_global") == other.removesuffix("_batch")
            shared = {n for n in one.keys() & runs[other].keys() if n.startswith("0/network.")}
            pair = {n: one[n] for n in shared}, {n: runs[other][n] for n in shared}
            if same:
                assert_same_weights(*pair, 1e-10)
            else:
                with pytest.raises(AssertionError):
                    assert_same_weights(*pair, 1e-4)


# -- negatives of the whole global batch ------------------------------------------------------------------------------


def gradients_and_terms(config: RunConfig, order: list[int] | None = None) -> tuple[dict[str, Tensor], Any]:
    """Parameters of this rank's peers after three steps, with the gradients of the last, and its terms; statistics of
    BatchNorm stay as they are at first, so that no row knows of another but by the method.

    Args:
        order: of the rows of the global batch, if it is not their own.
    """
    cohort = cohort_in_double(config)
    for resident in cohort.residents.values():
        for module in resident.peer.modules():
            if isinstance(module, _BatchNorm):
                module.eval()
    for step in range(3):
        whole = global_batch(config, step)
        rows = torch.arange(len(whole.ids))[order or slice(None)][cohort.placement.rows(len(whole.ids))]
        mine = Batch((whole.images[rows],), whole.targets[rows], whole.ids[rows]).split(
            [len(share.rows) for share in cohort.shares]
        )
        terms = train_step(cohort, mine, Progress(step, STEPS_PER_EPOCH, 2), Clock(CPU)).terms
    named = {f"{k}/{n}": p for k, r in cohort.residents.items() for n, p in r.peer.named_parameters()}
    found = {name: p.detach().clone() for name, p in named.items()}
    found |= {f"gradient of {name}": p.grad.clone() for name, p in named.items() if p.grad is not None}
    return found, {key: x.item() for key, x in terms.items()}


def of_all_ranks(form: str, peers: int, ranks: int, placement: Any, order: Any = None, **options: Any) -> Any:
    ranks_found = run_world(ranks, gradients_and_terms, a_config(form, peers, placement, **options), order)
    values = [terms for _, terms in ranks_found]
    terms = {key: [v[key] for v in values if key in v] for key in {key for v in values for key in v}}
    return joined([found for found, _ in ranks_found]), {key: sum(v) / len(v) for key, v in terms.items()}


@pytest.mark.parametrize(
    ("peers", "ranks", "placement"),
    [(2, 2, COLOCATED), slow(2, 4, COLOCATED), (2, 2, SPREAD), slow(2, 4, SPREAD), slow(4, 4, HYBRID)],
)
@pytest.mark.parametrize("form", ["mcl", "lmcl"])
def test_global_negatives_are_those_of_one_process(form: str, peers: int, ranks: int, placement: Any) -> None:
    expected, values = of_all_ranks(f"{form}_global", peers, 1, COLOCATED)
    found, terms = of_all_ranks(f"{form}_global", peers, ranks, placement)
    assert any(name.startswith("gradient of 0/") for name in expected)
    assert terms == pytest.approx(values, rel=1e-10, abs=1e-13)
    assert_same_weights(found, expected, 1e-10)


@pytest.mark.parametrize("form", ["mcl", "lmcl"])
def test_negatives_of_a_rank_are_not(form: str) -> None:
    _, values = of_all_ranks(f"{form}_global", 2, 1, COLOCATED)
    _, terms = of_all_ranks(f"{form}_batch", 2, 2, COLOCATED)
    for name in ("vcl", "icl"):
        assert abs(terms[0, name] / values[0, name] - 1) > 0.05


def test_with_accumulation_negatives_are_those_of_the_micro_batches_of_all_ranks() -> None:
    """Two ranks' first micro-batches are rows 0 .. 2 and 6 .. 8."""
    expected, values = of_all_ranks(
        "mcl_global", 2, 1, COLOCATED, [0, 1, 2, 6, 7, 8, 3, 4, 5, 9, 10, 11], accumulation=2
    )
    found, terms = of_all_ranks("mcl_global", 2, 2, COLOCATED, accumulation=2)
    assert terms == pytest.approx(values, rel=1e-10, abs=1e-13)
    assert_same_weights(found, expected, 1e-10)


def exact_terms(config: RunConfig) -> Any:
    """Of one step in float32, the signals rounded on the wire."""
    cohort = cohort_of(config)
    for resident in cohort.residents.values():
        for module in resident.peer.modules():
            if isinstance(module, _BatchNorm):
                module.eval()
    [(terms, _)] = do_steps(cohort, [0])
    return terms


def test_in_bf16_on_the_wire_negatives_are_nearly_the_same() -> None:
    """A label that came over wrong would be another loss."""
    [expected] = run_world(1, exact_terms, a_config("mcl_global", 2, COLOCATED))
    found = run_world(4, exact_terms, a_config("mcl_global", 2, COLOCATED | {"exchange_dtype": "bf16"}))
    for key in [(k, name) for k in range(2) for name in ("vcl", "icl")]:
        value = sum(terms[key] for terms in found) / 4
        assert value == pytest.approx(expected[key], rel=3e-3)
        assert value != expected[key]


# -- memory banks -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("form", "peers", "ranks", "placement"),
    [
        ("mcl_memory", 2, 2, SPREAD),
        ("mcl_memory", 3, 3, SPREAD),
        ("mcl_memory", 2, 4, SPREAD),
        ("mcl_shared_negatives", 2, 2, COLOCATED),
        slow("lmcl_memory", 2, 3, COLOCATED),
    ],
)
def test_banks_in_shards_are_the_whole_ones_bit_by_bit(form: str, peers: int, ranks: int, placement: Any) -> None:
    whole = trained(form, peers, ranks, placement, False)
    sharded = trained(form, peers, ranks, placement, False, bank_sharded=True)
    assert sum("banks" in name for name in whole) == peers
    assert_same_weights(sharded, whole, 0)


def rows_that_move(config: RunConfig) -> list[dict[str, Tensor]]:
    cohort = cohort_of(config)
    seen = [banks(cohort)]
    for step in (0, 1, 0):
        do_steps(cohort, [step])
        seen.append(banks(cohort))
    return seen


def test_a_step_moves_the_rows_of_its_images_alone() -> None:
    config = a_config("mcl_memory", 2, SPREAD)
    for seen in run_world(4, rows_that_move, config):
        for (before, after), step in zip(itertools.pairwise(seen), (0, 1, 0), strict=True):
            for name, x in after.items():
                moved = (x != before[name]).any(1).nonzero().flatten()
                assert torch.equal(moved, global_batch(config, step).ids), name
                assert torch.allclose(x[moved].norm(dim=1), torch.ones(ROWS))


def skipped_step(config: RunConfig) -> bool:
    def spoil(step: int, rank: int, images: Tensor) -> None:
        if step == 1 and rank == 0:
            images[0] = torch.nan

    cohort = cohort_of(config)
    do_steps(cohort, [0])
    before = banks(cohort)
    [(_, skipped)] = do_steps(cohort, [1], spoil=spoil)
    assert skipped == 1
    after = banks(cohort)
    return all(torch.equal(x, after[name]) for name, x in before.items())


@pytest.mark.parametrize("sharded", [False, True])
def test_a_skipped_step_leaves_the_banks_alone(sharded: bool) -> None:
    assert run_world(2, skipped_step, a_config("mcl_memory", 2, SPREAD, bank_sharded=sharded)) == [True, True]

"""L-MCL's `replicas: published`: heads that no one synchronises, so that the published code can be compared with."""

from __future__ import annotations

import torch
from torch import Tensor

from engine.training.consistency import check_same_weights
from tests.engine.stepping import cohort_of, config_of, do_steps, state
from tests.worlds import run_world


def after_three_steps(replicas: str) -> dict[str, Tensor]:
    method = {"name": "lmcl", "width": 16, "meta_interval": 2, "negatives": "memory", "num_negatives": 20}
    cohort = cohort_of(config_of(method | {"replicas": replicas}, placement={"kind": "colocated"}))
    cohort.prepare(torch.arange(60) % 10)
    do_steps(cohort, range(3))
    check_same_weights(cohort, 3)
    banks = cohort.method.memory.banks  # type: ignore[union-attr]
    return state(cohort) | {f"bank/{k}": bank.rows.clone() for k, bank in enumerate(banks)}  # type: ignore[arg-type]


def differing(replicas: str) -> set[str]:
    one, other = run_world(2, after_three_steps, replicas)
    return {name for name, x in one.items() if "running" not in name and not torch.equal(x, other[name])}


def test_replicas_agree_bit_by_bit_unless_the_published_form_is_asked_for() -> None:
    assert differing("synchronised") == set()
    found = differing("published")
    assert {name.split(".")[1] for name in found if "head." in name} == {"projections", "gate"}
    assert {name for name in found if "head." not in name} == {"bank/0", "bank/1"}
    assert not any("network." in name or "match" in name for name in found)


def written_rows() -> tuple[Tensor, Tensor]:
    """What the first bank holds for the images of the batches, and the others."""
    method = {"name": "lmcl", "width": 16, "negatives": "memory", "num_negatives": 20, "replicas": "published"}
    method |= {"bank_momentum": 0.0}  # so that nothing of the start is kept
    cohort = cohort_of(config_of(method, placement={"kind": "colocated"}))
    cohort.prepare(torch.arange(60) % 10)
    do_steps(cohort, range(2))
    rows = cohort.method.memory.banks[0].rows  # type: ignore[union-attr,index]
    return rows[:12].clone(), rows[12:].clone()


def test_published_banks_differ_only_where_nothing_has_been_written() -> None:
    (one, never), (other, never_either) = run_world(2, written_rows)
    assert not torch.equal(never, never_either)
    assert torch.equal(one, other)

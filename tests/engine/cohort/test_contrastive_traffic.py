"""What MCL and L-MCL send, counted in calls and bytes on real ranks."""

from __future__ import annotations

import pytest

from engine.config import RunConfig
from engine.training.step import train_step
from losses import Progress
from tests.engine.cohort.test_contrastive import COLOCATED, SPREAD, WIDTH, a_config
from tests.engine.ranks.exchanging.test_exchange import BF16, FLOAT, ROWS, Call, Parts, Recorder, agreement
from tests.engine.stepping import (
    CLASSES,
    STEPS_PER_EPOCH,
    batches,
    cohort_of,
    do_steps,
)
from tests.worlds import run_world

EMBEDDINGS = {"mcl": WIDTH, "lmcl": CLASSES + 3 * WIDTH + 3 * 128}
"""Numbers of a row: L-MCL's peers of three exits show the gate's logits, embeddings, and what the weights come from."""
NUMBERED = 8
"""Those of a row's target and id."""


def calls_of(config: RunConfig, step: int) -> tuple[list[Call], int]:
    """The collectives of a step when ranks have told each other all shapes, and the bytes of this rank's gradients and
    of what an outer step averages."""
    cohort = cohort_of(config)
    do_steps(cohort, [0, 1])
    [(_, pieces)] = batches(cohort, [step])
    with Recorder() as recorder:
        train_step(cohort, pieces, Progress(step, STEPS_PER_EPOCH, 2), Parts(recorder))
    return recorder.calls, sum(p.numel() for r in cohort.residents.values() for p in r.peer.parameters()) * FLOAT


ALL = ["mcl_batch", "mcl_global", "mcl_memory", "lmcl_batch", "lmcl_global", "lmcl_memory"]


@pytest.mark.parametrize(("form", "wire"), [*((form, "float32") for form in ALL), ("mcl_global", "bf16")])
def test_one_exchange_a_step(form: str, wire: str) -> None:
    config = a_config(form, 2, SPREAD | {"exchange_dtype": wire})
    method, _, negatives = form.partition("_")
    numbers = EMBEDDINGS[method] + (0 if negatives == "batch" else NUMBERED)
    size = (FLOAT if wire == "float32" else BF16) * ROWS * numbers
    there = Call("exchange", "allgather_base", (0, 1), size)
    back = [] if negatives == "memory" else [Call("backward", "reduce_scatter_base", (0, 1), 2 * size)]
    for calls, _ in run_world(2, calls_of, config, 1):
        assert calls == [there, *back, agreement(2)]


@pytest.mark.parametrize("form", ["mcl_global", "mcl_memory", "lmcl_batch"])
def test_colocated_alone_sends_nothing(form: str) -> None:
    [(calls, _)] = run_world(1, calls_of, a_config(form, 2, COLOCATED), 1)
    assert calls == []


@pytest.mark.parametrize("form", ["mcl_global", "mcl_memory"])
def test_over_replicas_the_one_exchange_is_over_the_world(form: str) -> None:
    """Colocated, what two peers show is sent to the other replica; spread, to all."""
    rows = ROWS // 2
    for placement, peers, world in ((COLOCATED, 2, (0, 1)), (SPREAD, 1, (0, 1, 2, 3))):
        size = FLOAT * rows * (peers * WIDTH + NUMBERED)
        for calls, gradients in run_world(len(world), calls_of, a_config(form, 2, placement), 1):
            assert calls[0] == Call("exchange", "allgather_base", world, size)
            assert calls[-1] == agreement(len(world))
            scattered = [call for call in calls if call.collective == "reduce_scatter_base"]
            back = Call("backward", "reduce_scatter_base", world, len(world) * size)
            assert scattered == ([] if form == "mcl_memory" else [back])
            averaged = [call for call in calls[1:-1] if call not in scattered]
            assert {(call.part, call.collective, len(call.ranks)) for call in averaged} == {
                ("backward", "allreduce", 2)
            }
            assert sum(call.size for call in averaged) == gradients


def test_a_bank_in_shards_is_read_in_three_all_to_alls() -> None:
    """For each bank and step once for the objective and once for the update, and no all-gather is added."""
    for calls, _ in run_world(2, calls_of, a_config("mcl_memory", 2, SPREAD, bank_sharded=True), 1):
        counts = [call.part for call in calls if call.collective == "alltoall_base"]
        assert sorted(set(counts)) == ["backward", "optimizer"]
        assert len(counts) == 2 * 3 + 2 * 3
        assert [call.collective for call in calls if call.collective != "alltoall_base"] == [
            "allgather_base",
            "allreduce",
        ]


GATHER, SCATTER = "allgather_base", "reduce_scatter_base"
THERE, AGAIN = [GATHER, SCATTER], [GATHER, SCATTER]
"""Of a look-ahead step on the contrastive losses: there and back; and back along it for the second derivative, which
differentiates the way back and then the way there."""


@pytest.mark.parametrize("form", ["lmcl_batch", "lmcl_global", "lmcl_memory"])
def test_what_an_outer_step_adds_spread(form: str) -> None:
    """Four forward passes, T_in = 2: 2 + 1 look-ahead steps and the end, and back. f_out carries no gradient across."""
    numbers = EMBEDDINGS["lmcl"] + (0 if form == "lmcl_batch" else NUMBERED)
    size = FLOAT * ROWS * numbers
    back = 0 if form == "lmcl_memory" else 1
    for calls, _ in run_world(2, calls_of, a_config(form, 2, SPREAD), 2):
        added = calls[2 + back :]
        assert [call.collective for call in added[:-1]] == 2 * THERE + 2 * [GATHER] + 2 * AGAIN
        assert {call.size for call in added[:-1]} == {size, 2 * size}
        assert added[-1] == agreement(2)


def test_what_an_outer_step_adds_over_replicas() -> None:
    """Where peers are colocated, all-reduces of the gradients: one for each of four on the way, three on the way back,
    and one of what it is all for."""
    for calls, gradients in run_world(2, calls_of, a_config("lmcl_batch", 2, COLOCATED), 2):
        *added, last = [call for call in calls if call.part == "optimizer"][1:]
        assert last == agreement(2)
        match = 2 * 3 * (16 * 128 + 128) * FLOAT
        theta = gradients - match
        assert added == [Call("optimizer", "allreduce", (0, 1), size) for size in 7 * [theta] + [match]]

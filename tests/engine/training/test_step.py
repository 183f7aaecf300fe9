"""One training step: accumulation, clipping, moving averages, skipped updates, number formats."""

from __future__ import annotations

import copy
import functools
import math
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from engine.config import RunConfig
from engine.ranks.collectives import Launch
from engine.safety.answers import TrainingDivergedError
from engine.trainer import train
from engine.training.meter import Meter
from engine.training.step import train_step
from engine.training.timing import Clock
from losses import Progress
from tests.engine.stepping import (
    CPU,
    STEPS_PER_EPOCH,
    batches,
    cohort_of,
    config_of,
    do_steps,
    global_batch,
    joined,
    numbers_of,
    optimizer_state,
    state,
    train_states,
)
from tests.marks import slow
from tests.runs import assert_same_weights, small_run
from tests.worlds import run_ranks, run_world

# Without BatchNorm, so that a row's result does not depend on the rows beside it.
VIT = [{"network": "timm/test_vit", "copies": 2, "options": {"img_size": 16, "patch_size": 8}}]

# -- accumulation and replicas ----------------------------------------------------------------------------------------


@functools.cache
def trained_on_whole_batches() -> dict[str, Tensor]:
    return joined(run_world(1, train_states, config_of(None, VIT, placement={"kind": "colocated"}), 3))


@pytest.mark.parametrize(
    ("ranks", "kind", "parts"),
    [
        slow(1, "colocated", 2),
        (1, "colocated", 4),
        slow(2, "colocated", 1),
        (2, "colocated", 3),
        (2, "spread", 4),
        (4, "spread", 2),
    ],
)
def test_micro_batches_and_replicas_give_the_update_of_the_whole_batch(ranks: int, kind: str, parts: int) -> None:
    cut = config_of(None, VIT, placement={"kind": kind}, train={"epochs": 2, "accumulation": parts})
    assert_same_weights(joined(run_world(ranks, train_states, cut, 3)), trained_on_whole_batches())


def reported(config: RunConfig) -> Any:
    return do_steps(cohort_of(config), range(2))


def test_terms_are_means_over_the_micro_batches() -> None:
    whole = run_world(1, reported, config_of(None, VIT))[0]
    cut = run_world(1, reported, config_of(None, VIT, train={"epochs": 2, "accumulation": 3}))[0]
    for (one, _), (other, _) in zip(cut, whole, strict=True):
        assert one == pytest.approx(other, rel=1e-4)


# -- clipping ---------------------------------------------------------------------------------------------------------

PLAIN = {"name": "momentum", "momentum": 0.9, "weight_decay": 0.0, "lr": 0.5}


def one_step(config: RunConfig) -> Any:
    cohort = cohort_of(config)
    networks = copy.deepcopy([r.peer.network for r in cohort.residents.values()])
    [(terms, _)] = do_steps(cohort, [0])
    return networks, state(cohort), {k: value for (k, name), value in terms.items() if name == "grad_norm"}


@pytest.mark.parametrize("clip", [0.05, 1e6])
def test_clipping_scales_the_gradient_of_each_peer_to_the_norm(clip: float) -> None:
    """Against float64: w - lr g min(1, clip / |g|) with |g| over all parameters of one peer."""
    config = config_of(
        {"name": "independent"}, optimizer=PLAIN, train={"epochs": 2, "clip_norm": clip}, precision={"tf32": False}
    )
    [(networks, after, norms)] = run_world(1, one_step, config)
    batch = global_batch(config, 0)
    for k, network in enumerate(networks):
        network = network.double().train()
        nn.functional.cross_entropy(network(batch.images.double()), batch.targets).backward()
        norm = math.sqrt(sum(float(p.grad.square().sum()) for p in network.parameters()))
        assert norm > 0.1
        assert norms[k] == pytest.approx(norm, rel=1e-4)
        for name, p in network.named_parameters():
            expected = p.detach() - 0.5 * p.grad * min(1.0, clip / norm)
            torch.testing.assert_close(after[f"{k}/network.{name}"].double(), expected, rtol=1e-4, atol=1e-5)
        assert (clip / norm < 1) == (clip == 0.05)


# -- moving averages --------------------------------------------------------------------------------------------------


def averages(config: RunConfig) -> Any:
    cohort = cohort_of(config)
    history = [copy.deepcopy(cohort.networks(ema=ema)[0].state_dict()) for ema in (False, True)]
    now, average = [history[0]], [history[1]]
    for step in range(4):
        do_steps(cohort, [step])
        now.append(copy.deepcopy(cohort.networks()[0].state_dict()))
        average.append(copy.deepcopy(cohort.networks(ema=True)[0].state_dict()))
    return now, average


# 1 - (1 + t)^(-2/3) for t = 0, 1, 2, 3
WARMING = [0.0, 0.37003947505256341, 0.51925016050989999, 0.60314973700795013]


@pytest.mark.parametrize(
    ("warmup", "decays"), [(False, [0.7] * 4), (True, WARMING), (True, [min(d, 0.4) for d in WARMING])]
)
def test_moving_average_follows_its_recurrence(warmup: bool, decays: list[float]) -> None:
    """a_0 = w_0, a_t = d_t a_{t-1} + (1 - d_t) w_t, of parameters and BatchNorm statistics."""
    train = {"epochs": 2, "ema_decay": 0.4 if decays[-1] == 0.4 else 0.7, "ema_warmup": warmup}
    [(now, average)] = run_world(1, averages, config_of(train=train))
    for name in now[0]:
        if not now[0][name].is_floating_point():
            continue
        expected = now[0][name].double()
        for t in range(1, 5):
            expected = decays[t - 1] * expected + (1 - decays[t - 1]) * now[t][name].double()
            torch.testing.assert_close(average[t][name].double(), expected, rtol=1e-5, atol=1e-6)
    assert not torch.equal(now[4]["fc.weight"], average[4]["fc.weight"])


# -- skipped updates --------------------------------------------------------------------------------------------------


def spoil(at: int, rank: int, value: float) -> Any:
    def change(step: int, here: int, images: Tensor) -> None:
        if (step, here) == (at, rank):
            images[-1, 0, 3, 3] = value

    return change


def around_a_spoilt_step(config: RunConfig, at: int, rank: int, channels: int = 1) -> Any:
    """Everything that is remembered before the spoilt step, after it, and after one more."""
    cohort = cohort_of(config, channels)
    done = do_steps(cohort, range(at), channels)
    seen = []
    for step in (at, at + 1):
        seen.append(state(cohort) | optimizer_state(cohort))
        done += do_steps(cohort, [step], channels, spoil(at, rank, math.nan))
    return [*seen, state(cohort) | optimizer_state(cohort)], [skipped for _, skipped in done], done[-1][0]


SKIPS = [
    pytest.param({"name": "independent"}, 2, "spread", {"lr": 0.05}, id="spread"),
    pytest.param({"name": "dml"}, 2, "colocated", {"lr": 0.05}, id="replicas"),
    pytest.param({"name": "dml"}, 4, "spread", {"lr": 0.05}, id="spread over replicas"),
    pytest.param({"name": "dml", "order": "sequential"}, 2, "spread", {"lr": 0.05}, id="in turn"),
    pytest.param({"name": "independent"}, 2, "spread", {"name": "adamw", "lr": 0.001}, id="adamw"),
    pytest.param({"name": "independent"}, 2, "spread", {"name": "lamb", "lr": 0.001}, id="lamb, not fused"),
]


@pytest.mark.parametrize("at", [slow(0), 2])
@pytest.mark.parametrize(("method", "ranks", "kind", "optimizer"), SKIPS)
def test_one_bad_pixel_on_one_rank_skips_the_update_on_all(
    method: dict[str, Any], ranks: int, kind: str, optimizer: dict[str, Any], at: int
) -> None:
    config = config_of(method, placement={"kind": kind}, optimizer=optimizer)
    for (before, after, later), skipped, terms in run_world(ranks, around_a_spoilt_step, config, at, 1):
        assert skipped == [0] * at + [1, 0]
        # What an optimiser first makes in the skipped step itself is judged by the weights that come of it, below.
        assert before.keys() <= after.keys()
        for name in before:
            assert torch.equal(before[name], after[name]), f"{name} changed in the skipped step"
        assert all(x.isfinite().all() for x in later.values())
        assert all(math.isfinite(value) for value in terms.values())
        assert not torch.equal(after_weights(after), after_weights(later))


def after_weights(tensors: dict[str, Tensor]) -> Tensor:
    return torch.cat([x.reshape(-1) for name, x in tensors.items() if name.endswith("conv1.weight")])


def final_states(config: RunConfig, steps: list[int], at: int) -> Any:
    cohort = cohort_of(config)
    do_steps(cohort, steps, spoil=spoil(at, 0, math.inf))
    return state(cohort)


@pytest.mark.parametrize("at", [0, 1])
@pytest.mark.parametrize("optimizer", [{"lr": 0.05}, {"name": "adamw", "lr": 0.001}])
def test_training_goes_on_as_if_the_skipped_batch_had_never_been(optimizer: dict[str, Any], at: int) -> None:
    config = config_of(optimizer=optimizer)
    [spoilt] = run_world(1, final_states, config, [0, 1, 2, 3], at)
    [without] = run_world(1, final_states, config, [s for s in range(4) if s != at], -1)
    assert_same_weights(spoilt, without, 0)


def metered(config: RunConfig) -> Any:
    cohort = cohort_of(config)
    meter, terms_of = Meter(cohort.placement, CPU), []
    readings = []
    for bad in ((1, 2), (5,), ()):
        for _ in range(3):
            step = len(terms_of)
            for _, pieces in batches(cohort, [step], spoil=spoil(step if step in bad else -1, 0, math.nan)):
                outcome = train_step(cohort, pieces, Progress(step, STEPS_PER_EPOCH, 2), Clock(CPU))
            meter.add(outcome)
            terms_of.append(numbers_of(outcome))
        readings.append(meter.read())
    return terms_of, readings


def test_skipped_updates_are_counted_and_left_out_of_the_means() -> None:
    ranks = run_world(2, metered, config_of({"name": "independent"}, placement={"kind": "spread"}))
    for _, readings in ranks:
        assert [(reading.skipped, reading.longest) for reading in readings] == [(2, (1, 2)), (1, (-2, 2)), (0, (-1, 1))]
        for reading, steps in zip(readings, ([0], [3, 4], [6, 7, 8]), strict=True):
            for k in (0, 1):
                for name in ("ce", "grad_norm"):
                    expected = sum(ranks[k][0][step][k, name] for step in steps) / len(steps)
                    values = reading.norms[k] if name == "grad_norm" else reading.terms[k, name]
                    assert values.nanmean().item() == pytest.approx(expected, rel=1e-5)


def diverges(config: RunConfig) -> str:
    try:
        train(config, Launch.from_environment())
    except TrainingDivergedError as error:
        return str(error)
    return "ended"


def test_too_many_skipped_in_a_row_end_the_run_on_all_ranks_at_one_step(tiny: Path, tmp_path: Path) -> None:
    """At this rate step 1 makes the weights infinite; 2, 3 and 4 are skipped, and every second step somebody looks."""
    config = small_run(
        tiny,
        tmp_path,
        placement={"kind": "spread"},
        optimizer={"lr": 1e38},
        train={"max_skipped": 3},
        schedule={"name": "constant"},
    )
    messages = run_ranks(2, diverges, config)
    assert messages[0] == messages[1]
    assert messages[0].startswith(
        "3 updates in a row met a non-finite loss or gradient, up to step 4; the limit is train.max_skipped = 3."
    )


# -- number formats ---------------------------------------------------------------------------------------------------


def in_precision(config: RunConfig, channels: int) -> Any:
    cohort = cohort_of(config, channels)
    before = state(cohort)
    done = do_steps(cohort, range(2), channels)
    return done, cohort.scaler.get_scale(), before, state(cohort)


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("amp", ["bf16", "fp16"])
def test_autocast_trains(amp: str, channels: int) -> None:
    """Three channels, too: only then is a channels-last weight not contiguous."""
    optimizer = {"lr": 1e-3}
    config = config_of(placement={"kind": "spread"}, precision={"amp": amp}, optimizer=optimizer)
    full = config_of(placement={"kind": "spread"}, optimizer=optimizer)
    exact = run_world(2, in_precision, full, channels)
    for rank, (done, _, before, after) in enumerate(run_world(2, in_precision, config, channels)):
        assert [skipped for _, skipped in done] == [0, 0]
        for (terms, _), (expected, _) in zip(done, exact[rank][0], strict=True):
            assert {k: v for k, v in terms.items() if k[1] == "ce"} == pytest.approx(
                {k: v for k, v in expected.items() if k[1] == "ce"}, rel=0.05
            )
        assert any(not torch.equal(before[name], after[name]) for name in before)
        assert all(x.dtype != torch.float16 and x.isfinite().all() for x in after.values())


def scales(config: RunConfig, at: int) -> Any:
    cohort = cohort_of(config)
    found, states = [cohort.scaler.get_scale()], [state(cohort)]
    skips = []
    for step in range(3):
        skips += [skipped for _, skipped in do_steps(cohort, [step], spoil=spoil(at, 1, math.inf))]
        found.append(cohort.scaler.get_scale())
        states.append(state(cohort))
    return found, skips, states


@pytest.mark.parametrize("at", [0, slow(1)])
@pytest.mark.parametrize(
    ("kind", "optimizer"),
    [("spread", "sgd"), ("colocated", "sgd"), ("spread", "adamw"), ("spread", "lamb"), ("balanced", "sgd")],
)
def test_fp16_scale_halves_on_all_ranks_where_one_overflows(kind: str, optimizer: str, at: int) -> None:
    config = config_of(
        {"name": "independent"},
        placement={"kind": kind},
        precision={"amp": "fp16"},
        optimizer={"name": optimizer, "lr": 1e-3},
    )
    for found, skips, states in run_world(3 if kind == "balanced" else 2, scales, config, at):
        assert skips == [int(step == at) for step in range(3)]
        assert found == [65536.0 if step <= at else 32768.0 for step in range(4)]
        assert_same_weights(states[at + 1], states[at], 0)
        assert all(x.isfinite().all() for x in states[3].values())
        assert not torch.equal(after_weights(states[at + 1]), after_weights(states[at + 2]))


@pytest.mark.slow
@pytest.mark.skipif(not shutil.which("g++"), reason="torch.compile needs g++ on a CPU")
@pytest.mark.parametrize("ranks", [1, 2])
def test_compiled_networks_give_the_same_losses(ranks: int) -> None:
    kind = {"kind": "spread" if ranks == 2 else "colocated"}
    eager = run_world(ranks, reported, config_of(placement=kind))
    compiled = run_world(ranks, reported, config_of(placement=kind, precision={"compile": True}), timeout=280)
    for one, other in zip(compiled, eager, strict=True):
        for (terms, _), (expected, _) in zip(one, other, strict=True):
            assert terms == pytest.approx(expected, rel=1e-4)


# -- turns ------------------------------------------------------------------------------------------------------------


def statistics_after_a_step(config: RunConfig) -> Any:
    cohort = cohort_of(config)
    do_steps(cohort, [0])
    return {
        k: {name: x.clone() for name, x in r.whole.named_buffers() if not name.startswith("_")}
        for k, r in cohort.residents.items()
    }


def test_peers_that_are_looked_at_again_follow_a_batch_once() -> None:
    """Before its own update every peer has its initial weights, in turns or not: after a step of either, the running
    statistics (m <- 0.9 m + 0.1 batch) and their counters are the same."""
    in_turn, at_once = (
        run_world(1, statistics_after_a_step, config_of({"name": "dml", "order": order}, 3))[0]
        for order in ("sequential", "simultaneous")
    )
    for k, buffers in at_once.items():
        assert any(name.endswith("running_mean") for name in buffers)
        for name, x in buffers.items():
            assert torch.equal(in_turn[k][name], x), (k, name)

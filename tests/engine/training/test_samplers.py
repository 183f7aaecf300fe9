"""Batches made of classes are data like any other: the same in every placement, and after a kill."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from engine.config import ConfigError, RunConfig
from engine.ranks.planning.choosing import plan
from engine.safety import checkpoint, loading
from tests.kills import assert_same_state, final_state, kill_run, numbers
from tests.marks import often, slow
from tests.runs import assert_same_weights, small_run, train_here, weights
from tests.worlds import run_ranks

SAMPLERS = ("class_balanced", "class_tuples")


def a_run(tiny: Path, folder: Path, sampler: str, data: dict[str, Any], **sections: Any) -> RunConfig:
    """Batches of 8 pairs, 5 to 7 an epoch; a line of metrics every step, a checkpoint every 4."""
    sections = {"log": {"every_steps": 1}, "checkpoint": {"every_steps": 4, "keep": 9}, **sections}
    return small_run(tiny, folder, data={"global_batch": 16, "sampler": sampler, **data}, **sections)


@pytest.fixture(scope="module")
def trained(tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """The folder of a run that nobody killed; once for each (sampler, part that is held out, ranks, placement)."""
    done: dict[Any, Path] = {}

    def train(sampler: str, held_out: float, ranks: int, kind: str) -> Path:
        key = (sampler, held_out, ranks, kind)
        if key not in done:
            done[key] = tmp_path_factory.mktemp("run")
            config = a_run(tiny, done[key], sampler, {"held_out": held_out}, placement={"kind": kind})
            run_ranks(ranks, train_here, config)
        return done[key]

    return train


@pytest.mark.parametrize("held_out", [slow(0.0), 0.2])
@pytest.mark.parametrize("sampler", SAMPLERS)
def test_spread_equals_colocated(trained: Any, sampler: str, held_out: float) -> None:
    colocated = weights(trained(sampler, held_out, 1, "colocated"))
    assert_same_weights(weights(trained(sampler, held_out, 2, "spread")), colocated)


@pytest.mark.parametrize("sampler", often(SAMPLERS, "class_tuples"))
def test_spread_over_replicas_equals_colocated_over_as_many(trained: Any, sampler: str) -> None:
    """Two replicas on either side, so that BatchNorm sees the same rows."""
    colocated = weights(trained(sampler, 0.2, 2, "colocated"))
    assert_same_weights(weights(trained(sampler, 0.2, 4, "spread")), colocated)


def test_samplers_differ(trained: Any) -> None:
    """The equalities above would hold if nobody looked at the key, too."""
    runs = [weights(trained(name, 0.2, 1, "colocated")) for name in ("shuffle", *SAMPLERS)]
    for i, one in enumerate(runs):
        for other in runs[:i]:
            with pytest.raises(AssertionError):
                assert_same_weights(one, other, 1e-3)


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_a_run_killed_in_the_middle_of_an_epoch_ends_as_the_undisturbed_one(
    tiny: Path, tmp_path: Path, trained: Any, sampler: str
) -> None:
    config = a_run(tiny, tmp_path, sampler, {"held_out": 0.2}, placement={"kind": "spread"})
    kill_run(2, config, lambda: 4 in checkpoint.steps_on_disk(tmp_path), victim=1, mercy=0.0)
    for step in checkpoint.steps_on_disk(tmp_path):
        if step > 4:
            checkpoint.folder_of(tmp_path, step).rename(tmp_path / f"elsewhere_{step}")
    manifest, _ = loading.newest(tmp_path)
    assert manifest is not None
    assert manifest.step == 4
    run_ranks(2, train_here, config)
    undisturbed = trained(sampler, 0.2, 2, "spread")
    assert_same_state(final_state(tmp_path), final_state(undisturbed))
    assert numbers(tmp_path) == numbers(undisturbed)


def test_replicas_get_whole_tuples(tiny: Path, tmp_path: Path) -> None:
    config = a_run(tiny, tmp_path, "class_balanced", {"images_per_class": 4}, placement={"kind": "colocated"})
    assert [plan(config, 4, rank).rows(16) for rank in range(4)] == [slice(i, i + 4) for i in range(0, 16, 4)]
    with pytest.raises(ConfigError) as caught:
        plan(config, 8, 0)
    assert str(caught.value) == (
        "data.global_batch = 16: 8 replicas x 1 micro-batches do not get a whole tuple of 4 images of a class each; "
        "expected at least 32"
    )

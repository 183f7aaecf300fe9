"""The answers to what went wrong, without a run; tests/engine/safety/test_rollback.py has runs that are given them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from engine import trainer
from engine.config import RunConfig
from engine.safety import checkpoint, rollback
from engine.safety.answers import Told, TrainingDivergedError, answer, answer_scores, tell_collapses
from engine.safety.health import LINES_SHOW, SCORES_SHOW
from engine.safety.rollback import GoBack, Rollback
from engine.safety.spikes import Spike
from engine.training.meter import Reading
from tests.engine.stepping import config_of
from tests.runs import small_run, train_here
from tests.worlds import run_ranks

QUIET = Reading(terms={}, norms={}, skipped=0, longest=(0, 0))
SPIKE = Spike("a", step=1, loss=9.0, usual=1.0, count=1)


@pytest.fixture
def said() -> list[tuple[str, str]]:
    return []


def goes_back(folder: Path, most: int = 2) -> RunConfig:
    config = config_of(health={"rollback": True, "max_rollbacks": most})
    return config.model_copy(update={"dir": folder})


def test_where_nothing_went_wrong_nothing_is_said(said: list[tuple[str, str]]) -> None:
    answer(config_of(), [], QUIET, [], 6, 9, lambda *text: said.append(text))
    assert said == []


def test_a_spike_is_said_with_its_step(said: list[tuple[str, str]]) -> None:
    """After step 6 come 7 and 8, and the reading's step 1 is the second of them."""
    answer(config_of(), [], QUIET, [SPIKE], 6, 9, lambda *text: said.append(text))
    [(title, text)] = said
    assert title == "loss spike"
    assert text.startswith(
        "step 8: the loss of a is 9, the median of the steps before was 1; 1 such steps up to step 9"
    )


def test_steps_that_are_left_out_have_no_place_in_the_reading(said: list[tuple[str, str]]) -> None:
    """Of the updates 6 to 11, counted from 0, those from 7 to 9 are left out: the second that was made is 10."""
    answer(config_of(), [Rollback(7, 10, "")], QUIET, [SPIKE], 6, 12, lambda *text: said.append(text))
    assert said[0][1].startswith("step 11: ")


def test_going_back_is_written_down_by_rank_0_before_it_is_raised(tmp_path: Path, said: list[tuple[str, str]]) -> None:
    config = goes_back(tmp_path)
    with pytest.raises(GoBack):
        answer(config, [], QUIET, [SPIKE], 6, 9, None)
    assert rollback.read(config.folder) == []
    with pytest.raises(GoBack):
        answer(config, [], QUIET, [SPIKE], 6, 9, lambda *text: said.append(text))
    [kept] = rollback.read(config.folder)
    # The spike is update 7, whose loss the update before may have made; that one is the first since the last line.
    assert (kept.begin, kept.end) == (6, 9)
    assert [title for title, _ in said] == ["going back"]
    assert said[0][1].startswith(kept.reason)


def test_after_the_last_rollback_the_run_ends(tmp_path: Path) -> None:
    with pytest.raises(TrainingDivergedError, match=r"has gone back 2 times; the limit is health\.max_rollbacks = 2"):
        answer(goes_back(tmp_path), [Rollback(0, 1, "")] * 2, QUIET, [SPIKE], 6, 9, None)


def test_too_many_skipped_updates_end_a_run_that_does_not_go_back() -> None:
    config = config_of(train={"epochs": 2, "max_skipped": 3})
    answer(config, [], Reading({}, {}, 2, (0, 2)), [], 6, 9, None)
    with pytest.raises(TrainingDivergedError, match=r"^3 updates in a row met .* up to step 9"):
        answer(config, [], Reading({}, {}, 2, (-1, 3)), [], 6, 9, None)


def test_a_collapse_is_said_once_until_the_peer_has_recovered(said: list[tuple[str, str]]) -> None:
    told: Told = frozenset()
    for step, found in enumerate([{"a": "no gradient"}, {"a": "no gradient"}, {}, {"a": "no gradient"}]):
        told = tell_collapses(found, LINES_SHOW, told, step, lambda *text: said.append(text))
        # An evaluation does not see whether a gradient is 0, and is no sign of recovery.
        told = tell_collapses({}, SCORES_SHOW, told, step, lambda *text: said.append(text))
    assert [text.partition(":")[0] for _, text in said] == ["step 0", "step 3"]
    assert {title for title, _ in said} == {"a collapsed"}


SCORES = {"val/a/loss": float("nan"), "val/a/top1": 10.0, "ema/a/loss": float("inf")}


def test_an_evaluation_that_is_no_number_ends_the_run(said: list[tuple[str, str]]) -> None:
    text = (
        "^step 9: the evaluation gave val/a/loss = nan: the weights have diverged. "
        "Checkpoints of up to step 5 are from before"
    )
    with pytest.raises(TrainingDivergedError, match=text):
        answer_scores(config_of(), [], SCORES, 6, 9, 0, lambda *text: said.append(text))
    answer_scores(config_of(), [], {"val/a/loss": 2.0, "ema/a/loss": float("inf")}, 6, 9, 0, None)


@pytest.mark.parametrize(("in_a_row", "before"), [(7, "Checkpoints of up to step 1 are"), (8, "No checkpoint is")])
def test_what_led_to_an_evaluation_that_is_no_number_was_there_before_the_updates_that_were_skipped(
    in_a_row: int, before: str
) -> None:
    """Of nine updates the last seven were skipped: the second one may be what made them so."""
    with pytest.raises(TrainingDivergedError, match=rf"diverged\. {before} from before"):
        answer_scores(config_of(), [], SCORES, 6, 9, in_a_row, None)


def test_an_evaluation_that_is_no_number_is_a_reason_to_go_back(tmp_path: Path, said: list[tuple[str, str]]) -> None:
    config = goes_back(tmp_path)
    with pytest.raises(GoBack):
        answer_scores(config, [], SCORES, 6, 9, 0, lambda *text: said.append(text))
    [kept] = rollback.read(config.folder)
    assert (kept.begin, kept.end) == (5, 9)


def poisoned(config: RunConfig, first: int) -> None:
    """From update `first` on every loss is NaN; 20 in a row would end the run, which has fewer."""
    train_step, done = trainer.train_step, iter(range(1 << 30))

    def step(cohort: Any, batches: Any, *rest: Any) -> Any:
        if next(done) >= first:
            for batch in batches:
                for view in batch.views:
                    view.mul_(float("nan"))
        return train_step(cohort, batches, *rest)

    trainer.train_step = step
    train_here(config)


def broken(config: RunConfig, update: int) -> None:
    """An update multiplies all weights by 1e25, and all losses from the next one on are NaN."""
    train_step, done = trainer.train_step, iter(range(1 << 30))

    def step(cohort: Any, *rest: Any) -> Any:
        outcome = train_step(cohort, *rest)
        if next(done) == update:
            with torch.no_grad():
                for network in cohort.networks().values():
                    for p in network.parameters():
                        p.mul_(1e25)
        return outcome

    trainer.train_step = step
    train_here(config)


def test_an_update_that_breaks_the_weights_pushes_out_no_checkpoint_from_before_it(tiny: Path, tmp_path: Path) -> None:
    config = small_run(tiny, tmp_path, checkpoint={"every_steps": 1, "keep": 1}, log={"every_steps": 1})
    with pytest.raises(RuntimeError, match="Checkpoints of up to step 6 are from before"):
        run_ranks(1, broken, config, 6)
    # The seventh update is the broken one. It is saved, as nothing has shown it by then.
    assert checkpoint.steps_on_disk(tmp_path)[-2:] == [6, 7]


def test_a_row_of_skipped_updates_pushes_out_no_checkpoint_from_before_it(tiny: Path, tmp_path: Path) -> None:
    config = small_run(tiny, tmp_path, checkpoint={"every_steps": 1, "keep": 1}, log={"every_steps": 1})
    run_ranks(1, poisoned, config, 7)
    # Step 5 is the best, 7 the last before the row, 10 the end.
    assert checkpoint.steps_on_disk(tmp_path)[-2:] == [7, 10]

"""TensorBoard's event files hold what metrics.jsonl holds, over a run that was cut short too."""

from __future__ import annotations

from pathlib import Path

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from engine.reporting.tensorboard_run import TensorBoardRun
from engine.reporting.tracking import read_metrics
from tests.runs import small_run, train_here


def scalars(run: Path) -> dict[tuple[str, int], float]:
    """What TensorBoard shows: (name, step) to value."""
    found = EventAccumulator(str(run / "tensorboard"), size_guidance={"scalars": 0})
    found.Reload()
    shown = [(name, event) for name in found.Tags()["scalars"] for event in found.Scalars(name)]
    points = {(name, event.step): event.value for name, event in shown}
    # Nothing is drawn at two heights; both lines of a step that ends an epoch say which epoch that is.
    assert len(points) == len({(name, event.step, event.value) for name, event in shown})
    return points


def test_a_run_that_goes_on_is_one_curve_of_what_metrics_hold(tiny: Path, tmp_path: Path) -> None:
    for epochs in (1, 2):
        log = {"tensorboard": True, "every_steps": 2}
        train_here(small_run(tiny, tmp_path, train={"epochs": epochs}, schedule={"name": "constant"}, log=log))
    lines = read_metrics(tmp_path)
    held = {(key, line["step"]): x for line in lines for key, x in line.items() if key != "step" and x is not None}
    assert len({step for _, step in held}) > 4
    assert scalars(tmp_path) == pytest.approx(held, rel=1e-6)  # event files have float32


def test_what_was_written_after_the_checkpoint_is_drawn_once(tiny: Path, tmp_path: Path) -> None:
    config = small_run(tiny, tmp_path, log={"tensorboard": True})
    for begin, steps, value in ((0, (1, 2, 3), 1.0), (2, (3, 4), 2.0)):
        run = TensorBoardRun(config, begin, pytest.fail)
        for step in steps:
            run.write({"step": step, "train/a/ce": value, "lr": None})
        run.finish()
    assert scalars(tmp_path) == {("train/a/ce", step): 1.0 if step < 3 else 2.0 for step in (1, 2, 3, 4)}


def test_a_folder_that_cannot_be_written_is_told_once_and_holds_nothing_up(tiny: Path, tmp_path: Path) -> None:
    (tmp_path / "tensorboard").write_text("in its place")
    said: list[str] = []
    run = TensorBoardRun(small_run(tiny, tmp_path, log={"tensorboard": True}), 0, said.append)
    for step in range(100):
        run.write({"step": step, "lr": 0.1})
    run.finish()
    (told,) = said
    assert told.startswith("tensorboard: ")
    assert told.endswith(f"going on without it, metrics are in {tmp_path / 'metrics.jsonl'}")

"""A signal to any rank: all end after the same step, saved, and the run goes on as if nothing had happened."""

from __future__ import annotations

import itertools
import os
import signal
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from engine import trainer
from engine.config import RunConfig
from engine.ranks import gathering
from engine.ranks.collectives import Launch
from engine.reporting.tracking import read_metrics
from engine.safety import loading, saving
from engine.safety.preemption import Preemption
from engine.trainer import train
from launch.with_parent import end_with_parent
from tests.kills import assert_same_state, chance, final_state, last_step, numbers, running, state_of
from tests.runs import small_run, train_here
from tests.worlds import _context, run_ranks

STEPS = 20


def a_run(tiny: Path, folder: Path, method: dict[str, Any] | None = None, **sections: Any) -> RunConfig:
    """4 epochs of 5 steps; a line of metrics every step, a checkpoint every epoch."""
    sections = {"train": {"epochs": 4, "ema_decay": 0.9}, "log": {"every_steps": 1}, **sections}
    return small_run(tiny, folder, method, **sections)


@pytest.fixture(scope="module")
def undisturbed(tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """The folder of a run that got no signal; once for each (ranks, method, further sections)."""
    done: dict[str, Path] = {}

    def of(ranks: int = 2, method: dict[str, Any] | None = None, **sections: Any) -> Path:
        key = f"{ranks} {method} {sections}"
        if key not in done:
            done[key] = tmp_path_factory.mktemp("undisturbed")
            run_ranks(ranks, train_here, a_run(tiny, done[key], method, **sections))
        return done[key]

    return of


def send_when(config: RunConfig, due: Callable[[list[int]], bool], victims: list[int], *signals: int) -> None:
    """Runs two ranks, sends the signals to some of them as soon as `due(process ids)`, and expects both to end well."""
    deadline = time.monotonic() + 240
    with running(2, config, train_patiently) as ranks:
        pids = [process.pid or 0 for process in ranks]
        while not due(pids):
            assert all(process.is_alive() for process in ranks), "the run ended before the moment came"
            assert time.monotonic() < deadline, "the moment did not come within 60 s"
        for number in signals:
            for victim in victims:
                os.kill(pids[victim], number)
        for process in ranks:
            process.join(60)
        assert [process.exitcode for process in ranks] == [0, 0]
    print(f"signals {signals} to {victims}: {state_of(config.folder)}")


def train_patiently(config: RunConfig) -> None:
    """On a busy machine one rank may come long after the other, which has got a signal."""
    gathering.GRACE = 60.0
    train_here(config)


def listens(pid: int) -> bool:
    """Whether a process has a handler for SIGUSR1."""
    caught = next(line for line in Path(f"/proc/{pid}/status").read_text().splitlines() if line.startswith("SigCgt"))
    return bool(int(caught.split()[1], 16) >> (signal.SIGUSR1 - 1) & 1)


def saved(folder: Path) -> int:
    """The step of the newest checkpoint, which must be the last that the metrics know of."""
    manifest, damaged = loading.newest(folder)
    assert manifest is not None
    assert not damaged
    assert manifest.step == last_step(folder)
    return manifest.step


@pytest.mark.parametrize(
    ("victims", "signals"),
    [
        pytest.param([0], [signal.SIGUSR1], marks=pytest.mark.slow),
        ([1], [signal.SIGTERM]),
        pytest.param([0, 1], [signal.SIGUSR1], marks=pytest.mark.slow),
        ([0, 1], [signal.SIGUSR1, signal.SIGTERM, signal.SIGUSR1, signal.SIGINT]),
    ],
    ids=["first", "second", "all", "several_times"],
)
def test_a_signal_at_any_moment_saves_the_step_and_nothing_is_lost(
    tiny: Path, tmp_path: Path, undisturbed: Any, victims: list[int], signals: list[int]
) -> None:
    config = a_run(tiny, tmp_path)
    when = chance.randrange(1, STEPS - 6)
    send_when(config, lambda pids: last_step(tmp_path) >= when, victims, *signals)
    assert when <= saved(tmp_path) < STEPS
    run_ranks(2, train_here, config)
    assert_same_state(final_state(tmp_path), final_state(undisturbed()))
    assert numbers(tmp_path) == numbers(undisturbed())


def test_a_signal_before_the_first_step_saves_the_first_step(tiny: Path, tmp_path: Path, undisturbed: Any) -> None:
    config = a_run(tiny, tmp_path)
    send_when(config, lambda pids: listens(pids[1]), [1], signal.SIGUSR1)
    assert saved(tmp_path) == 1
    # And again, which is how a run advances where machines are taken away all the time.
    send_when(config, lambda pids: listens(pids[0]), [0], signal.SIGUSR1)
    assert saved(tmp_path) == 2
    run_ranks(2, train_here, config)
    assert_same_state(final_state(tmp_path), final_state(undisturbed()))
    assert numbers(tmp_path) == numbers(undisturbed())


@pytest.mark.slow
def test_peers_that_are_updated_in_turn_end_after_a_whole_step(tiny: Path, tmp_path: Path, undisturbed: Any) -> None:
    in_turn = {"name": "dml", "order": "sequential"}
    config = a_run(tiny, tmp_path, in_turn)
    send_when(config, lambda pids: last_step(tmp_path) >= 3, [1], signal.SIGUSR1)
    assert saved(tmp_path) < STEPS
    run_ranks(2, train_here, config)
    assert_same_state(final_state(tmp_path), final_state(undisturbed(2, in_turn)))


def test_two_replicas_train_the_same_weights_on(tiny: Path, tmp_path: Path, undisturbed: Any) -> None:
    """Saving averages BatchNorm's statistics over the replicas, here once more than without a signal: they alone are
    rounded differently."""
    colocated = {"placement": {"kind": "colocated"}}
    config = a_run(tiny, tmp_path, **colocated)
    send_when(config, lambda pids: last_step(tmp_path) >= 7, [0], signal.SIGUSR1)
    run_ranks(2, train_here, config)
    one, other = final_state(tmp_path), final_state(undisturbed(2, **colocated))
    statistics = {key for key in one if "running_" in key}
    assert_same_state(
        {k: one[k] for k in one if k not in statistics}, {k: other[k] for k in other if k not in statistics}
    )
    assert_same_state({k: one[k] for k in statistics}, {k: other[k] for k in statistics}, relative=1e-5)


def train_with_a_signal_in(config: RunConfig, function: str, step: int, preempted: Path) -> tuple[bool, int]:
    """Trains; rank 1 gets SIGUSR1 when a function of the trainer's begins, once `step` steps are done.

    Returns:
        Whether the run is complete, and how often the signal was sent.
    """
    launch = Launch.from_environment()
    done, sent = [0], []
    where = trainer.Saver if function == "save" else trainer
    interrupted, train_step = getattr(where, function), trainer.train_step

    def interrupt(*arguments: Any, **keywords: Any) -> Any:
        if launch.rank == 1 and not sent and done[0] >= step:
            sent.append(step)
            os.kill(os.getpid(), signal.SIGUSR1)
        return interrupted(*arguments, **keywords)

    def count(*arguments: Any) -> Any:
        done[0] += 1
        return train_step(*arguments)

    trainer.train_step = count
    setattr(where, function, interrupt)
    return train(config, launch, preempted=preempted), len(sent)


@pytest.mark.parametrize("function", ["evaluate_cohort", "save"])
def test_what_a_signal_meets_is_finished_and_one_more_step_is_made_and_saved(
    tiny: Path, tmp_path: Path, undisturbed: Any, function: str
) -> None:
    config, preempted = a_run(tiny, tmp_path / "run"), tmp_path / "preempted"
    assert run_ranks(2, train_with_a_signal_in, config, function, 10, preempted) == [(False, 0), (False, 1)]
    assert preempted.read_text() == "SIGUSR1\n"
    assert saved(config.folder) == 11
    run_ranks(2, train_here, config)
    assert_same_state(final_state(config.folder), final_state(undisturbed()))
    assert numbers(config.folder) == numbers(undisturbed())


def test_a_signal_after_the_last_step_leaves_a_complete_run(tiny: Path, tmp_path: Path, undisturbed: Any) -> None:
    config, preempted = a_run(tiny, tmp_path / "run"), tmp_path / "preempted"
    assert run_ranks(2, train_with_a_signal_in, config, "save", STEPS, preempted) == [(True, 0), (True, 1)]
    assert not preempted.exists()
    assert_same_state(final_state(config.folder), final_state(undisturbed()))


def test_a_signal_in_the_last_step_of_an_epoch_is_no_reason_to_leave_out_its_evaluation(
    tiny: Path, tmp_path: Path, undisturbed: Any
) -> None:
    config = a_run(tiny, tmp_path / "run")
    # Before step 10, the last of its epoch, is asked for: agreed on in it.
    run_ranks(2, train_with_a_signal_in, config, "check_same_rows", 9, tmp_path / "preempted")
    assert saved(config.folder) == 10
    assert [line["step"] for line in read_metrics(config.folder) if "val/disagreement" in line] == [5, 10]
    run_ranks(2, train_here, config)
    assert numbers(config.folder) == numbers(undisturbed())


def train_in_a_storm(config: RunConfig, preempted: Path, sent: tuple[signal.Signals, ...]) -> bool:
    """Trains as launch/train.py does; from the first step on this process gets signals, to its very end."""
    signal.signal(signal.SIGHUP, signal.SIG_DFL)  # The tests may be run under nohup.
    train_step, rounds, one_more = trainer.train_step, itertools.count(), threading.Semaphore(0)

    def storm() -> None:
        for _ in rounds:
            for number in sent:
                os.kill(os.getpid(), number)
            one_more.release()
            time.sleep(0.01)

    def step(*arguments: Any) -> Any:
        if not thread.is_alive():
            thread.start()
            one_more.acquire()  # On a busy machine the run could be over before the first of them.
        return train_step(*arguments)

    thread = threading.Thread(target=storm, daemon=True)
    trainer.train_step = step
    complete = train(config, Launch.from_environment(), preempted=preempted, ends_process=True)
    while one_more.acquire(blocking=False):
        pass
    for _ in range(10):  # The end of the process takes a while, too.
        one_more.acquire()
    return complete


@pytest.mark.parametrize("sent", [(signal.SIGUSR1, signal.SIGTERM), (signal.SIGHUP,)])
def test_signals_that_do_not_cease_change_nothing_once_stopping_is_agreed(
    tiny: Path, tmp_path: Path, sent: tuple[signal.Signals, ...]
) -> None:
    config, preempted = a_run(tiny, tmp_path / "run"), tmp_path / "preempted"
    assert run_ranks(2, train_in_a_storm, config, preempted, sent) == [False, False]
    assert preempted.read_text() == f"{max(sent).name}\n" or len(sent) > 1
    assert saved(config.folder) < STEPS


def fail_to_save(config: RunConfig, preempted: Path) -> None:
    saving.AGAIN = ()
    train_with_a_signal_in(config, "check_same_rows", 3, preempted)


def test_a_save_at_a_signal_that_fails_is_not_claimed(tiny: Path, tmp_path: Path) -> None:
    config, preempted = a_run(tiny, tmp_path / "run"), tmp_path / "preempted"
    config.folder.mkdir()
    (config.folder / "checkpoints").write_text("in the way")
    with pytest.raises(RuntimeError, match=r"NotSavedError: .*the last, could not be saved"):
        run_ranks(2, fail_to_save, config, preempted)
    assert not preempted.exists()


def test_a_second_ctrl_c_ends_at_once() -> None:
    """In a process of its own, which does not come back."""
    with pytest.raises(RuntimeError, match=r"exit codes \[-2\]"):
        run_ranks(1, _press_twice)


def _press_twice() -> None:
    preemption, stop = Preemption(torch.device("cpu")), torch.zeros(1)
    with preemption.listening():
        os.kill(os.getpid(), signal.SIGINT)
        os.kill(os.getpid(), signal.SIGINT)  # the same one, passed on by a launcher
        preemption.ask(stop)
        assert preemption.agreed(stop) == signal.SIGINT
        time.sleep(1.1)
        os.kill(os.getpid(), signal.SIGINT)
    raise AssertionError("still there")


def test_handlers_are_those_of_before_afterwards() -> None:
    before = [signal.getsignal(number) for number in (signal.SIGUSR1, signal.SIGTERM, signal.SIGINT)]
    with Preemption(torch.device("cpu")).listening():
        assert signal.getsignal(signal.SIGUSR1) != before[0]
    assert [signal.getsignal(number) for number in (signal.SIGUSR1, signal.SIGTERM, signal.SIGINT)] == before


def leave_a_child(note: Path) -> None:
    """Forks a process that ends with this one, which then waits to be killed."""
    if os.fork() == 0:
        end_with_parent()
        note.write_text(f"{os.getpid()}\n")
    time.sleep(120)


def test_a_process_ends_with_the_one_that_started_it(tmp_path: Path) -> None:
    parent = _context().Process(target=leave_a_child, args=(tmp_path / "note",))
    parent.start()
    deadline = time.monotonic() + 240
    while not (tmp_path / "note").exists() or not (tmp_path / "note").read_text().endswith("\n"):
        assert time.monotonic() < deadline
        time.sleep(0.01)
    status = Path(f"/proc/{(tmp_path / 'note').read_text().strip()}/status")
    assert "State:\tZ" not in status.read_text()
    parent.kill()
    parent.join()
    while status.exists() and "State:\tZ" not in status.read_text():
        assert time.monotonic() < deadline, "it lives on"
        time.sleep(0.01)

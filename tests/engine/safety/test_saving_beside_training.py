"""A checkpoint is written beside training, and is of the moment of its save."""

from __future__ import annotations

import threading
import time
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from engine.config import RunConfig
from engine.files import sync
from engine.safety import checkpoint, loading, saving
from engine.safety.checkpoint import Standing
from engine.safety.saving import Saver
from tests.checkpoints import a_run
from tests.engine.safety.cohorts import a_cohort, fill
from tests.kills import running
from tests.runs import train_here
from tests.worlds import run_world


def learnt(folder: Path, step: int) -> set[float]:
    """The values of the weights and the momentum of all peers in a checkpoint."""
    at = checkpoint.folder_of(folder, step)
    found = set()
    for peer in loading.verify(at).peers:
        state = loading.read_state(at, f"peer_{peer}.pt")
        found |= {float(x) for kept in state["optimizer"]["state"].values() for x in kept["momentum_buffer"].unique()}
        found |= {float(x) for x in state["network"]["conv1.weight"].unique()}
    return found


def save_and_change(config: RunConfig) -> list[float]:
    """Saves five times; changes everything as soon as each save returns, and communicates meanwhile."""
    cohort = a_cohort(config)
    said: list[str] = []
    saver = Saver(config.folder, cohort, said.append)
    sums = []
    for step in range(1, 6):
        fill(cohort, float(step))
        saver.save(Standing(step, None, 0, {}, 0), keep=9)
        fill(cohort, -1.0)
        number = torch.ones(1)
        for _ in range(50):
            dist.all_reduce(number)
            number /= dist.get_world_size()
        sums.append(float(number))
    saver.wait()
    dist.barrier()
    assert checkpoint.steps_on_disk(config.folder) == [1, 2, 3, 4, 5]
    saver.close()
    assert said == []
    return sums


@pytest.mark.parametrize("ranks", [1, 2, 4])
def test_what_is_written_is_the_state_of_the_moment_of_the_save(tiny: Path, tmp_path: Path, ranks: int) -> None:
    assert run_world(ranks, save_and_change, a_run(tiny, tmp_path), timeout=240) == [[1.0] * 5] * ranks
    for step in range(1, 6):
        assert learnt(tmp_path, step) == {float(step)}


def save_while_one_is_written(config: RunConfig, hold: Path) -> tuple[bool, bool]:
    """Whether the first save returned before its files were written, and the second only after."""
    release = threading.Event()

    def held(path: Path) -> None:
        release.wait(30)
        sync(path)

    saving.sync = held
    cohort = a_cohort(config)
    saver = Saver(config.folder, cohort, print)
    saver.save(Standing(1, None, 0, {}, 0), keep=9)
    before = checkpoint.steps_on_disk(config.folder)
    threading.Timer(0.3, release.set).start()
    saver.save(Standing(2, None, 0, {}, 0), keep=9)
    after = checkpoint.steps_on_disk(config.folder)
    saver.wait()
    saver.close()
    return before == [], after == [1]


def test_a_save_returns_before_the_disk_has_it_and_the_next_one_waits_for_it(tiny: Path, tmp_path: Path) -> None:
    assert run_world(1, save_while_one_is_written, a_run(tiny, tmp_path), tmp_path) == [(True, True)]
    assert checkpoint.steps_on_disk(tmp_path) == [1, 2]


def test_only_the_first_rank_of_each_peer_copies_and_writes(tiny: Path, tmp_path: Path) -> None:
    assert run_world(4, writes, a_run(tiny, tmp_path)) == [True, False, True, False]
    assert run_world(2, writes, a_run(tiny, tmp_path, placement={"kind": "colocated"})) == [True, False]


def writes(config: RunConfig) -> bool:
    saver = Saver(config.folder, a_cohort(config), print)
    saver.save(Standing(1, None, 0, {}, 0), keep=1)
    wrote = saver._pending is not None
    saver.wait()
    saver.close()
    return wrote


def save_with_a_slow_disk(config: RunConfig) -> None:
    saving.sync = lambda path: (time.sleep(1), sync(path))
    train_here(config)


@pytest.mark.parametrize("victim", [0, 2])
def test_a_rank_that_dies_while_it_writes_ends_the_others_soon_and_leaves_nothing_that_looks_whole(
    tiny: Path, tmp_path: Path, victim: int
) -> None:
    config = a_run(tiny, tmp_path, peers=[{"network": "cifar_resnet8_b", "copies": 3, "options": {"width": 4}}])
    with running(3, config, save_with_a_slow_disk) as ranks:
        deadline = time.monotonic() + 240
        while not list(tmp_path.glob("checkpoints/*.tmp/*.pt")):
            assert time.monotonic() < deadline
            time.sleep(0.01)
        ranks[victim].kill()
        for process in ranks:
            process.join(60)
        assert all(process.exitcode for process in ranks), [process.exitcode for process in ranks]
    assert checkpoint.steps_on_disk(tmp_path) == []
    assert loading.newest(tmp_path) == (None, [])

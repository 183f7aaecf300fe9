"""Peers that are jobs of their own: what they take from the folder where they meet, and that nobody waits."""

from __future__ import annotations

import itertools
import logging
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from engine.config import RunConfig
from engine.config.loading import dump
from engine.ranks.collectives import Launch
from engine.ranks.meeting import LATE, Meeting
from engine.ranks.planning.choosing import plan
from engine.reporting.tracking import read_metrics
from engine.safety import checkpoint, loading
from engine.trainer import train
from losses import Signals
from tests.engine.cohort.test_parameters import is_parameter, states_after
from tests.engine.stepping import CPU, cohort_of, config_of, do_steps, state
from tests.kills import assert_same_state, final_state, kill_after_step, last_step, numbers, running
from tests.launch.command import run_command
from tests.marks import slow
from tests.runs import assert_same_weights, small_run, train_here, weights
from tests.worlds import run_ranks, run_world

NAMES = "abc"
STALE: dict[str, Any] = {"name": "codistillation", "interval": 5}


def peers(count: int) -> list[dict[str, Any]]:
    return [{"network": "cifar_resnet8_b", "name": NAMES[k], "options": {"width": 4}} for k in range(count)]


def a_job(tiny: Path, at: Path, peer: str, count: int = 2, interval: int = 5, **sections: Any) -> RunConfig:
    placement = {"kind": "jobs", "meeting": str(at / "meeting"), "peer": peer}
    method = {"name": "codistillation", "interval": interval}
    return small_run(tiny, at / "run", method, peers(count), placement=placement, **sections)


# -- the same numbers -------------------------------------------------------------------------------------------------


def anything(peer: int, shown: Signals) -> Tensor:
    """Answers of a peer that nobody here learns from."""
    return torch.zeros(1, 1)


def train_beside(config: RunConfig, rows: Mapping[int, list[Tensor]], steps: int) -> list[Any]:
    """States of one job after each step; before each step the others leave what `rows` has for its end."""
    cohort = cohort_of(config)
    world, rank = dist.get_world_size(), dist.get_rank()
    others = []
    for k, (name, _) in enumerate(config.cohort):
        if k not in cohort.residents:
            placement = config.placement.model_copy(update={"peer": name})
            theirs = config.model_copy(update={"placement": placement})
            others.append((k, Meeting(theirs, plan(theirs, world, rank), cohort.method.shapes_shown(), CPU)))
    seen = []
    for step in range(steps):
        for k, meeting in others:
            if step + 1 in rows:
                wire = torch.bfloat16 if getattr(config.method, "wire", "") == "bf16" else torch.float32
                meeting({k: {"weights": rows[step + 1][k]}}, step=step + 1, wire=wire, answers=anything)
        do_steps(cohort, [step])
        seen.append(state(cohort))
    return seen


@pytest.mark.parametrize(("count", "ranks", "wire"), [slow(2, 1, "float32"), slow(3, 1, "bf16"), (3, 2, "float32")])
def test_a_job_given_what_the_gang_exchanged_does_what_its_peer_does_in_the_gang(
    tmp_path: Path, count: int, ranks: int, wire: str
) -> None:
    """Bit by bit: weights, statistics and copies after each of 9 steps, with exchanges after 3 and 7 of them."""
    method = {"name": "codistillation", "burn_in": 3, "interval": 4, "wire": wire}
    gang = run_world(ranks, states_after, config_of(method, peers(count), placement={"kind": "colocated"}), range(9))
    rows = {
        step: [
            torch.cat(
                [
                    x.flatten()
                    for statistics in (False, True)
                    for name, x in gang[0][step][0].items()
                    if name.startswith(f"{k}/network.") and x.is_floating_point() and is_parameter(name) != statistics
                ]
            )
            for k in range(count)
        ]
        for step in (3, 7)
    }
    for k in range(count):
        placement = {"kind": "jobs", "meeting": str(tmp_path / f"meeting{k}"), "peer": NAMES[k]}
        job = run_world(ranks, train_beside, config_of(method, peers(count), placement=placement), rows, 9)
        for rank in range(ranks):
            for step in range(9):
                expected = gang[rank][step + 1][0]
                # Before the first exchange each keeps random copies, which nobody asks.
                for name, x in job[rank][step].items():
                    assert torch.equal(x, expected[name]), (k, rank, step, name)
            assert {name[0] for name in job[rank][8]} == {str(k), "m"}


def test_without_the_others_a_peer_is_trained_as_if_alone(tiny: Path, tmp_path: Path) -> None:
    run_ranks(1, train_here, a_job(tiny, tmp_path, "b"))
    run_ranks(1, train_here, small_run(tiny, tmp_path / "alone", {"name": "independent"}, peers(2)))
    alone = {name: x for name, x in weights(tmp_path / "alone").items() if name.startswith("b/")}
    assert_same_weights(weights(tmp_path / "run" / "b"), alone, relative=0)


@pytest.mark.parametrize("ranks", [slow(1), 2])
def test_killed_beside_a_frozen_file_a_job_goes_on_bit_by_bit(tiny: Path, tmp_path: Path, ranks: int) -> None:
    run_ranks(1, train_here, a_job(tiny, tmp_path, "b"))
    shutil.copytree(tmp_path / "meeting", tmp_path / "frozen")
    sections: dict[str, Any] = {
        "train": {"epochs": 4},
        "checkpoint": {"every_steps": 3},
        "log": {"progress": False, "every_steps": 1},
    }
    run_ranks(ranks, train_here, a_job(tiny, tmp_path, "a", **sections))
    (tmp_path / "run").rename(tmp_path / "undisturbed")
    # Killed after 12 steps: the copy is of the exchange after step 5 or 10, and its file has gone since.
    (tmp_path / "meeting").rename(tmp_path / "elsewhere")
    shutil.copytree(tmp_path / "frozen", tmp_path / "meeting")
    kill_after_step(ranks, a_job(tiny, tmp_path, "a", **sections), 12)
    run_ranks(ranks, train_here, a_job(tiny, tmp_path, "a", **sections))
    assert_same_state(final_state(tmp_path / "run" / "a"), final_state(tmp_path / "undisturbed" / "a"))
    assert numbers(tmp_path / "run" / "a") == numbers(tmp_path / "undisturbed" / "a")
    assert [line["train/a/kl"] > 0 for line in numbers(tmp_path / "run" / "a") if "lr" in line] == [
        step >= 5 for step in range(20)
    ]


# -- nobody waits -----------------------------------------------------------------------------------------------------


def train_and_keep_the_log(config: RunConfig) -> None:
    """As `train_here`; what the engine warns of stands in RUN/log.txt."""
    config.folder.mkdir(parents=True, exist_ok=True)
    handler = logging.FileHandler(config.folder / "log.txt")
    logging.getLogger("engine.ranks.meeting").addHandler(handler)
    train_here(config)


def log_of(config: RunConfig) -> list[str]:
    path = config.folder / "log.txt"
    return path.read_text().splitlines() if path.exists() else []


def wait_for(due: Callable[[], object], *jobs: list[BaseProcess]) -> None:
    deadline = time.monotonic() + 240
    while not due():
        assert all(rank.is_alive() for ranks in jobs for rank in ranks), "a job has ended too early"
        assert time.monotonic() < deadline, "did not come within 100 s"
        time.sleep(0.02)


def send(ranks: list[BaseProcess], what: signal.Signals) -> None:
    for rank in ranks:
        assert rank.pid
        os.kill(rank.pid, what)


@pytest.mark.parametrize("how", [slow("late"), "gone"])
def test_a_peer_that_is_late_or_gone_stops_nobody_and_is_named(tiny: Path, tmp_path: Path, how: str) -> None:
    """Peer a on two ranks, peer b on one. b stops; a goes on and says so; b comes back, and a says so again."""
    sections: dict[str, Any] = {
        "train": {"epochs": 400},
        "evaluation": {"every_epochs": 400},
        "checkpoint": {"every_epochs": 1},
    }
    a, b = (a_job(tiny, tmp_path, name, **sections) for name in "ab")
    file = tmp_path / "meeting" / "b.safetensors"
    with running(2, a, train_and_keep_the_log) as ranks_a:
        with running(1, b, train_and_keep_the_log) as ranks_b:
            wait_for(file.exists, ranks_a, ranks_b)
            wait_for(lambda: last_step(b.folder) > 10, ranks_a, ranks_b)
            send(ranks_b, signal.SIGSTOP if how == "late" else signal.SIGKILL)
            before, at = len(log_of(a)), last_step(a.folder)
            wait_for(lambda: any("nothing new" in line for line in log_of(a)[before:]), ranks_a)
            wait_for(lambda: last_step(a.folder) > at + 5 * LATE, ranks_a)
            send(ranks_a, signal.SIGSTOP)
            left, old = file.stat().st_mtime_ns, file.read_bytes()
            said = len(log_of(a))
            if how == "late":
                send(ranks_b, signal.SIGCONT)
                wait_for(lambda: file.stat().st_mtime_ns > left and file.read_bytes() != old)
                send(ranks_a, signal.SIGCONT)
                wait_for(lambda: any("is back" in line for line in log_of(a)[said:]), ranks_a, ranks_b)
        if how == "gone":
            with running(1, b, train_and_keep_the_log) as ranks_b:
                wait_for(lambda: file.stat().st_mtime_ns > left and file.read_bytes() != old, ranks_b)
                send(ranks_a, signal.SIGCONT)
                wait_for(lambda: any("is back" in line for line in log_of(a)[said:]), ranks_a, ranks_b)
                assert checkpoint.steps_on_disk(b.folder)
    for line in log_of(a):
        parts = line.split(": ", 1)
        assert parts[0].startswith("step ")
        assert parts[1].startswith(("peer b: nothing new in 3 exchanges; its ", "peer b is back: step ")), line
    turns = ["back" if "is back" in line else "late" for line in log_of(a)]
    assert all(one != other for one, other in itertools.pairwise(turns)), "said once, not at each exchange"


def test_three_jobs_run_to_their_ends_and_have_learnt_from_each_other(tiny: Path, tmp_path: Path) -> None:
    """Each is stopped after its first exchange until all have had theirs: then each finds the others."""
    jobs = [a_job(tiny, tmp_path, name, 3, train={"epochs": 12}) for name in NAMES]
    files = [tmp_path / "meeting" / f"{name}.safetensors" for name in NAMES]
    with running(1, jobs[0]) as one, running(1, jobs[1]) as two, running(1, jobs[2]) as three:
        for ranks, file in zip((one, two, three), files, strict=True):
            wait_for(file.exists)
            send(ranks, signal.SIGSTOP)
        for ranks in (one, two, three):
            send(ranks, signal.SIGCONT)
        for rank in (*one, *two, *three):
            rank.join(100)
            assert rank.exitcode == 0
    for k, config in enumerate(jobs):
        assert last_step(config.folder) == 60
        shared = loading.read_state(checkpoint.folder_of(config.folder, 60), "shared.pt")["modules"]
        assert shared["method._extra_state"].tolist() == [True] * 3
        assert loading.verify(checkpoint.folder_of(config.folder, 60)).peers == [NAMES[k]]
        last = [line for line in read_metrics(config.folder) if "lr" in line][-1]
        assert {key.split("/")[1] for key in last if key.startswith("train/") and key != "train/skipped"} == {NAMES[k]}
        assert last[f"train/{NAMES[k]}/kl"] > 0


# -- one run of several jobs ------------------------------------------------------------------------------------------


def test_started_over_a_peer_takes_away_what_it_has_left(tiny: Path, tmp_path: Path) -> None:
    run_ranks(1, train_here, a_job(tiny, tmp_path, "a"))
    left = tmp_path / "meeting" / "a.safetensors"
    assert left.exists()
    run_ranks(2, train_afresh, a_job(tiny, tmp_path, "a", interval=50))
    assert not left.exists()


def train_afresh(config: RunConfig) -> None:
    train(config, Launch.from_environment(), fresh=True)


def test_a_job_is_evaluated_exported_and_reported_as_a_run_of_one_peer(tiny: Path, tmp_path: Path) -> None:
    for name in "ab":
        run_ranks(1, train_here, a_job(tiny, tmp_path, name))
    runs = [str(tmp_path / "run" / name) for name in "ab"]
    _, out, _ = run_command("evaluate", runs[1])
    assert "jobs: one of 2 peers in this one, 1 rank a peer, 1 in all" in out
    last = [line for line in read_metrics(Path(runs[1])) if "val/disagreement" in line][-1]
    assert ["val/b/top1", f"{last['val/b/top1']:.4f}"] in [line.split() for line in out.splitlines()]
    assert last["val/ensemble/top1"] == last["val/b/top1"]
    assert "val/a/top1" not in last
    run_command("export", runs[1])
    assert sorted(path.name for path in (tmp_path / "run" / "b" / "export").iterdir()) == ["b.json", "b.safetensors"]
    _, out, _ = run_command("report", *runs, "--out", str(tmp_path / "both"))
    assert [line.split()[:3] for line in out.splitlines()[2:4]] == [
        ["small/a", "codistillation", "a"],
        ["small/a", "codistillation", "ensemble"],
    ]


@pytest.mark.slow
def test_two_jobs_under_torchrun(tiny: Path, tmp_path: Path) -> None:
    """As a user starts them: peer a on two ranks, peer b on one, at the same time."""
    config = a_job(tiny, tmp_path, "a", train={"epochs": 20}, device="cpu")
    (tmp_path / "jobs.yaml").write_text(dump(config))
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--nnodes=1", "--rdzv-backend=c10d"]
    jobs = [
        subprocess.Popen(
            [
                *(*torchrun, "--rdzv-endpoint=127.0.0.1:0", f"--nproc-per-node={ranks}"),
                *("launch/train.py", str(tmp_path / "jobs.yaml"), f"placement.peer={name}"),
            ],
            cwd=Path(__file__).parents[3],
            env={**os.environ, "OMP_NUM_THREADS": "1"},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for name, ranks in (("a", 2), ("b", 1))
    ]
    try:
        for job in jobs:
            out, err = job.communicate(timeout=240)
            assert job.returncode == 0, err
            assert "curves.png" in out
    finally:
        for job in jobs:
            job.kill()
    taken = []
    for name in "ab":
        folder = tmp_path / "run" / name
        assert last_step(folder) == 100
        shared = loading.read_state(checkpoint.folder_of(folder, 100), "shared.pt")["modules"]
        taken.append(shared["method._extra_state"].tolist())
    assert [True, True] in taken, "who ends last has found the other's weights at its last step"

"""Peers that are jobs of their own: what they take from the folder where they meet, and that nobody waits."""

from __future__ import annotations

import itertools
import json
import logging
import os
import pickle
import shutil
import signal
import struct
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from safetensors.torch import load_file, save_file
from torch import Tensor

from engine.config import RunConfig
from engine.config.loading import dump
from engine.ranks.collectives import Launch
from engine.ranks.meeting import LATE, Meeting
from engine.ranks.placement import plan
from engine.reporting.tracking import read_metrics
from engine.safety import checkpoint, loading
from engine.trainer import train
from tests.engine.cohort.test_parameters import is_parameter, states_after
from tests.engine.stepping import CPU, cohort_of, config_of, do_steps, state
from tests.kills import assert_same_state, final_state, kill_after_step, last_step, numbers, running
from tests.launch.command import run_command
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


def train_beside(config: RunConfig, rows: Mapping[int, list[Tensor]], steps: int) -> list[Any]:
    """States of one job after each step; before each step the others leave what `rows` has for its end."""
    cohort = cohort_of(config)
    world, rank = dist.get_world_size(), dist.get_rank()
    others = []
    for k, (name, _) in enumerate(config.cohort):
        if k not in cohort.residents:
            placement = config.placement.model_copy(update={"peer": name})
            theirs = config.model_copy(update={"placement": placement})
            others.append((k, Meeting(theirs, plan(theirs, world, rank), cohort.method.shown(), CPU)))
    seen = []
    for step in range(steps):
        for k, meeting in others:
            if step + 1 in rows:
                wire = torch.bfloat16 if getattr(config.method, "wire", "") == "bf16" else torch.float32
                meeting({k: {"weights": rows[step + 1][k]}}, step=step + 1, wire=wire)
        do_steps(cohort, [step])
        seen.append(state(cohort))
    return seen


@pytest.mark.parametrize(("count", "ranks", "wire"), [(2, 1, "float32"), (3, 1, "bf16"), (3, 2, "float32")])
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


@pytest.mark.parametrize("ranks", [1, 2])
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
    deadline = time.monotonic() + 100
    while not due():
        assert all(rank.is_alive() for ranks in jobs for rank in ranks), "a job has ended too early"
        assert time.monotonic() < deadline, "did not come within 100 s"
        time.sleep(0.02)


def send(ranks: list[BaseProcess], what: signal.Signals) -> None:
    for rank in ranks:
        assert rank.pid
        os.kill(rank.pid, what)


@pytest.mark.parametrize("how", ["late", "gone"])
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


# -- what lies in the folder ------------------------------------------------------------------------------------------


ROW = torch.arange(5.0)


def rewritten(path: Path, about: Mapping[str, str], tensors: dict[str, Tensor] | None = None) -> None:
    """The same file with other words in its header, or with other tensors."""
    raw = path.read_bytes()
    header = json.loads(raw[8 : 8 + struct.unpack("<Q", raw[:8])[0]])["__metadata__"]
    save_file(tensors or load_file(path), path, header | about)


def cut_short(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-3])


def flip_a_bit(path: Path) -> None:
    raw = bytearray(path.read_bytes())
    raw[-5] ^= 1
    path.write_bytes(raw)


def of_another_rate(path: Path) -> None:
    raw = path.read_bytes()
    header = json.loads(raw[8 : 8 + struct.unpack("<Q", raw[:8])[0]])["__metadata__"]
    config = json.loads(header["config"])
    config["optimizer"]["lr"] = 0.7
    rewritten(path, {"config": json.dumps(config)})


class _Evil:
    def __reduce__(self) -> Any:
        return Path.touch, (Path("/tmp/cohort_was_here"),)


DAMAGES: dict[str, tuple[Callable[[Path], Any], str]] = {
    "empty": (lambda path: path.write_bytes(b""), ""),
    "cut_short": (cut_short, "Error while deserializing"),
    "garbage": (lambda path: path.write_bytes(b"\xff" * 100), "not a safetensors file"),
    "header_only": (lambda path: path.write_bytes(path.read_bytes()[:100]), ""),
    "deep_json": (lambda path: path.write_bytes(struct.pack("<Q", 200_000) + b"[" * 200_000), ""),
    "pickle": (lambda path: path.write_bytes(pickle.dumps(_Evil())), "not a safetensors file"),
    "torch_save": (lambda path: torch.save({"weights": ROW}, path), "not a safetensors file"),
    "bit_flipped": (flip_a_bit, "altered: its SHA-256 is not the one in its header"),
    "foreign_tensors": (lambda path: save_file({"weights": ROW}, path), "'__metadata__'"),
    "of_another_peer": (lambda path: rewritten(path, {"peer": "c"}), "of peer 'c'"),
    "of_another_run": (of_another_rate, "of another run: optimizer.lr = 0.7 there, 0.05 here"),
    "config_is_no_json": (lambda path: rewritten(path, {"config": "{"}), "Expecting property name"),
    "other_shapes": (
        lambda path: rewritten(path, {}, {"weights": ROW[:4]}),
        "holds {'weights': (4,",
    ),
    "other_names": (lambda path: rewritten(path, {}, {"wights": ROW}), "holds {'wights': (5,"),
    "other_format": (
        lambda path: rewritten(path, {}, {"weights": ROW.half()}),
        "holds {'weights': (5,",
    ),
    "larger": (lambda path: rewritten(path, {}, {"weights": torch.zeros(9)}), "larger than the 20 bytes"),
    "a_folder": (lambda path: (path.unlink(), path.mkdir()), "not a file"),
    "a_pipe": (lambda path: (path.unlink(), os.mkfifo(path)), "not a file"),
    "a_loop": (lambda path: (path.unlink(), path.symlink_to(path)), "[Errno 40] Too many levels of symbolic links"),
    "without_a_step": (lambda path: rewritten(path, {"step": "soon"}), "invalid literal for int()"),
}


def take_what_is_damaged(one: RunConfig, other: RunConfig, damages: list[str]) -> Any:
    """For each damage: what a takes of b before it, with it twice, and after it, and what is said."""
    said: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: said.append(record.getMessage())  # type: ignore[method-assign]
    logging.getLogger("engine.ranks.meeting").addHandler(handler)
    path, outcomes = other.placement.meeting / "b.safetensors", {}
    assert other.placement.meeting
    for name in damages:
        shutil.rmtree(path.parent, ignore_errors=True)
        a, b = (Meeting(config, plan(config, 1, 0), [{"weights": (5,)}] * 2, CPU) for config in (one, other))
        said.clear()
        taken = []
        for step, value in enumerate((1.0, 2.0, 2.0, 3.0)):
            if name == "a_folder" and path.is_dir():
                path.rmdir()
            b({1: {"weights": ROW + value}}, step=10 * step + 5)
            if value == 2:
                DAMAGES[name][0](path)
            taken.append(a({0: {"weights": ROW}}, step=10 * step + 5)[1].get("weights"))
        outcomes[name] = (taken, list(said))
    return outcomes


def test_what_is_damaged_or_foreign_is_named_once_and_the_last_copy_stays(tmp_path: Path) -> None:
    placement = {"kind": "jobs", "meeting": str(tmp_path / "meeting")}
    one, other = (config_of(STALE, peers(2), placement=placement | {"peer": name}) for name in "ab")
    [outcomes] = run_world(1, take_what_is_damaged, one, other, list(DAMAGES))
    assert not Path("/tmp/cohort_was_here").exists()
    for name, (taken, said) in outcomes.items():
        first, *damaged, last = taken
        assert torch.equal(first, ROW + 1), name
        assert damaged == [None, None], name
        assert torch.equal(last, ROW + 3), name
        assert len(said) == 1, (name, said)
        line = said[0]
        beginning = f"step 15: {tmp_path}/meeting/b.safetensors: not used: {DAMAGES[name][1]}"
        assert line.startswith(beginning), (name, line)
        assert line.endswith("; its copy of step 5, 10 steps behind, stays in use"), (name, line)


def not_finite(one: RunConfig, other: RunConfig) -> Any:
    a, b = (Meeting(config, plan(config, 1, 0), [{"weights": (5,)}] * 2, CPU) for config in (one, other))
    b({1: {"weights": ROW * torch.inf}}, step=5)
    return a({0: {"weights": ROW}}, step=5)


def test_a_peer_that_has_diverged_teaches_nobody(tmp_path: Path) -> None:
    placement = {"kind": "jobs", "meeting": str(tmp_path / "meeting")}
    [(own, others)] = run_world(
        1, not_finite, *(config_of(STALE, peers(2), placement=placement | {"peer": name}) for name in "ab")
    )
    assert torch.equal(own["weights"], ROW)
    assert others == {}


def test_a_meeting_folder_that_cannot_be_written_to_stops_nobody(tiny: Path, tmp_path: Path) -> None:
    """Its place is taken by a file once the job has been checked, as a file system that has gone away."""
    config = a_job(tiny, tmp_path, "a", train={"epochs": 40}, evaluation={"every_epochs": 40})
    with running(1, config, train_and_keep_the_log) as ranks:
        wait_for((tmp_path / "meeting" / "a.safetensors").exists, ranks)
        send(ranks, signal.SIGSTOP)
        (tmp_path / "meeting").rename(tmp_path / "gone")
        (tmp_path / "meeting").write_text("")
        send(ranks, signal.SIGCONT)
        at = last_step(config.folder)
        wait_for(lambda: last_step(config.folder) > at + 20, ranks)
    said = [line.split(": ", 1)[1] for line in log_of(config)]
    assert (
        f"{tmp_path}/meeting/a.safetensors: not written: [Errno 17] File exists: '{tmp_path}/meeting'; training goes on"
        in said
    )
    assert any(
        line.startswith(f"{tmp_path}/meeting/b.safetensors: not used: [Errno 20] Not a directory") for line in said
    )


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    disk = tmp_path / "disk"
    disk.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=16k", "tmpfs", str(disk)], capture_output=True).returncode:
        pytest.skip("a disk of 16 kB cannot be mounted here")
    yield disk
    subprocess.run(["umount", str(disk)], check=True)


def test_a_full_disk_where_peers_meet_stops_nobody(tiny: Path, tmp_path: Path, small_disk: Path) -> None:
    placement = {"kind": "jobs", "meeting": str(small_disk), "peer": "a"}
    config = small_run(tiny, tmp_path / "run", STALE, peers(2), placement=placement)
    run_ranks(1, train_and_keep_the_log, config)
    full = "not written: [Errno 28] No space left on device; training goes on"
    assert [line.split(": ", 2)[2] for line in log_of(config)] == [full] * 2
    assert last_step(config.folder) == 10


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
    assert f"  {'val/b/top1':40} {last['val/b/top1']:.4f}\n" in out
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
            out, err = job.communicate(timeout=120)
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

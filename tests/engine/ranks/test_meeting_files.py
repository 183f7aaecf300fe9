"""What lies in the folder where peers meet is not believed: damage, foreign files, and disks that are full."""

from __future__ import annotations

import json
import logging
import os
import pickle
import shutil
import signal
import struct
import subprocess
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from engine.config import RunConfig
from engine.ranks.meeting import Meeting
from engine.ranks.planning.choosing import plan
from models import create
from tests.engine.cohort.test_parameters import is_parameter
from tests.engine.ranks.test_meeting import (
    STALE,
    a_job,
    anything,
    log_of,
    peers,
    send,
    train_and_keep_the_log,
    train_beside,
    wait_for,
)
from tests.engine.stepping import CPU, config_of
from tests.kills import last_step, running
from tests.runs import small_run
from tests.worlds import run_ranks, run_world

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
    "a_loop": (lambda path: (path.unlink(), path.symlink_to(path)), "Too many levels of symbolic links"),
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
            b({1: {"weights": ROW + value}}, step=10 * step + 5, answers=anything)
            if value == 2:
                DAMAGES[name][0](path)
            taken.append(a({0: {"weights": ROW}}, step=10 * step + 5, answers=anything)[1].get("weights"))
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
    b({1: {"weights": ROW * torch.inf}}, step=5, answers=anything)
    return a({0: {"weights": ROW}}, step=5, answers=anything)


def test_a_peer_that_has_diverged_teaches_nobody(tmp_path: Path) -> None:
    placement = {"kind": "jobs", "meeting": str(tmp_path / "meeting")}
    [(own, others)] = run_world(
        1, not_finite, *(config_of(STALE, peers(2), placement=placement | {"peer": name}) for name in "ab")
    )
    assert torch.equal(own["weights"], ROW)
    assert others == {}


def copies_beside(config: RunConfig, rows: Mapping[int, list[Tensor]], steps: int) -> Any:
    """After each step the copy of peer 1 in a row, and whether it is one; and what was said."""
    said: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: said.append(record.getMessage())  # type: ignore[method-assign]
    logging.getLogger("engine.ranks.meeting").addHandler(handler)
    seen = train_beside(config, rows, steps)
    names = [name for name in seen[0] if name.startswith("method/copies.1.") and seen[0][name].is_floating_point()]
    names.sort(key=lambda name: not is_parameter(name))
    taken = [state["method/_extra_state"].tolist() for state in seen]
    return [torch.cat([state[name].flatten() for name in names]) for state in seen], taken, said


def test_a_finite_and_absurd_copy_is_refused_by_its_peers_name_and_the_next_one_heals(tmp_path: Path) -> None:
    """A job on two ranks; beside it lie all 1e38, a negative variance, and what one can learn from, in turn."""
    torch.manual_seed(0)
    network = create("cifar_resnet8_b", 10, 1, width=4)
    buffers = [x for x in network.buffers() if x.is_floating_point()]
    good = torch.cat([x.detach().flatten() for x in (*network.parameters(), *buffers)])
    huge, negative = torch.full_like(good, 1e38), good.clone()
    negative[-1] = -1.0  # which is a variance of the last normalisation
    rows = {2: huge, 4: negative, 6: good, 8: huge, 10: good + 0.01}
    placement = {"kind": "jobs", "meeting": str(tmp_path / "meeting"), "peer": "a"}
    config = config_of({"name": "codistillation", "interval": 2}, peers(2), placement=placement)
    first, second = run_world(2, copies_beside, config, {step: [good, row] for step, row in rows.items()}, 11)
    for copies, taken, _ in (first, second):
        assert [there for _, there in taken] == [False] * 5 + [True] * 6
        assert all(torch.equal(copy, copies[0]) for copy in copies[:5])
        assert all(torch.equal(copy, good) for copy in copies[5:9])
        assert all(torch.equal(copy, rows[10]) for copy in copies[9:])
    why = "gives answers that are not finite, or above 1e+06, to images of this step"
    assert first[2] == [
        f"step 2: peer b: not used: at step 2 it {why}; its last copy, if there is one, stays in use",
        f"step 8: peer b: not used: at step 8 it {why}; its copy of step 6, 2 steps behind, stays in use",
    ]
    assert second[2] == []


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
    assert any(line.startswith(f"{tmp_path}/meeting/b.safetensors: not used: Not a directory") for line in said)


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

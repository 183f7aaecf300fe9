"""What torchrun and train.py make of signals, of dead agents and of failures, together."""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from engine.config import RunConfig
from engine.config.loading import dump
from engine.safety import loading
from tests.kills import assert_same_state, final_state, last_step, numbers
from tests.runs import small_run, train_here
from tests.worlds import free_port, run_ranks

ROOT = Path(__file__).parents[2]
ALONE = ["--nnodes=1", "--rdzv-endpoint=127.0.0.1:0"]

pytestmark = pytest.mark.slow


class Agent:
    """A torchrun, in a session of its own, and what it has printed."""

    def __init__(self, output: Path, config: Path, *options: str, arguments: tuple[str, ...] = ()) -> None:
        self.output = output
        with output.open("w") as file:
            self.process = subprocess.Popen(
                [
                    *(sys.executable, "-m", "torch.distributed.run", "--rdzv-backend=c10d", *options),
                    *("launch/train.py", str(config), *arguments),
                ],
                cwd=ROOT,
                stdout=file,
                stderr=subprocess.STDOUT,
                env={**os.environ, "OMP_NUM_THREADS": "1"},
            )

    def workers(self) -> dict[int, int]:
        """Process ids by rank."""
        found = {}
        pid = self.process.pid
        for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split():
            environment = dict(
                entry.split("=", 1) for entry in Path(f"/proc/{child}/environ").read_text().split("\0") if "=" in entry
            )
            if "RANK" in environment:
                found[int(environment["RANK"])] = int(child)
        return found

    def text(self) -> str:
        return self.output.read_text()


@contextlib.contextmanager
def agents(*started: Agent) -> Iterator[None]:
    try:
        yield
    finally:
        for agent in started:
            if agent.process.poll() is None:
                for pid in agent.workers().values():
                    os.kill(pid, signal.SIGKILL)
                agent.process.kill()
            agent.process.wait()


def _answers(port: int) -> bool:
    with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port), timeout=1):
        return True
    return False


def wait(due: Callable[[], bool], *running: Agent, seconds: float = 240) -> None:
    deadline = time.monotonic() + seconds
    while not due():
        assert time.monotonic() < deadline, "\n".join(agent.text() for agent in running)
        time.sleep(0.01)


@pytest.fixture
def run(tiny: Path, tmp_path: Path) -> tuple[RunConfig, Path]:
    """A run of 200 steps with a checkpoint every 3, and its file."""
    config = small_run(
        tiny,
        tmp_path / "run",
        train={"epochs": 40, "timeout": 6.0},
        checkpoint={"every_steps": 3},
        evaluation={"every_epochs": 10},
        log={"every_steps": 1},
    )
    (tmp_path / "run.yaml").write_text(dump(config))
    return config, tmp_path / "run.yaml"


@pytest.fixture
def undisturbed(tiny: Path, run: tuple[RunConfig, Path], tmp_path: Path) -> Path:
    run_ranks(2, train_here, run[0].model_copy(update={"dir": tmp_path / "undisturbed"}))
    return tmp_path / "undisturbed"


@pytest.mark.parametrize(
    ("number", "to", "code"),
    [(signal.SIGUSR1, "worker", 0), (signal.SIGTERM, "agent", 1), (signal.SIGINT, "agent", 1)],
)
def test_a_signal_saves_and_the_same_command_goes_on(
    run: tuple[RunConfig, Path], tmp_path: Path, undisturbed: Path, number: signal.Signals, to: str, code: int
) -> None:
    """torchrun itself ends with 1 if it got the signal, however well its workers ended."""
    config, file = run
    preempted = tmp_path / "preempted"
    options = (*ALONE, "--nproc-per-node=2", "--max-restarts=2")
    agent = Agent(tmp_path / "output", file, *options, arguments=("--preempted", str(preempted)))
    with agents(agent):
        wait(lambda: last_step(config.folder) >= 20, agent)
        os.kill(agent.workers()[1] if to == "worker" else agent.process.pid, number)
        assert agent.process.wait(60) == code, agent.text()
    assert preempted.read_text() == f"{number.name}\n"
    assert f"signal {number.name} at step {last_step(config.folder)}: saved" in agent.text()
    assert "deployed:" not in agent.text()
    again = Agent(tmp_path / "output", file, *options, arguments=("--preempted", str(preempted)))
    with agents(again):
        assert again.process.wait(120) == 0, again.text()
    assert not preempted.exists()
    assert "deployed:" in again.text()
    assert_same_state(final_state(config.folder), final_state(undisturbed))
    assert numbers(config.folder) == numbers(undisturbed)


def two_agents(tmp_path: Path, file: Path, *options: str, ranks: int = 1) -> tuple[Agent, Agent]:
    """With so many ranks each, as on two machines."""
    port = free_port()
    options = (f"--nproc-per-node={ranks}", "--max-restarts=3", f"--rdzv-endpoint=127.0.0.1:{port}", *options)
    first = Agent(tmp_path / "first", file, *options)
    wait(lambda: _answers(port), first)  # It holds the store of the agents.
    return first, Agent(tmp_path / "second", file, *options)


@pytest.mark.timeout(900)
def test_ranks_of_two_agents_are_replaced_again_and_again(
    run: tuple[RunConfig, Path], tmp_path: Path, undisturbed: Path
) -> None:
    """Agents count restarts differently, and keep a store that holds the addresses of the dead."""
    config, file = run
    both = two_agents(tmp_path, file, "--nnodes=2", "--rdzv-id=again")
    with agents(*both):
        for moment, loser in ((20, 1), (60, 0), (100, 1)):
            wait(lambda moment=moment: last_step(config.folder) >= moment, *both)
            os.kill(next(iter(both[loser].workers().values())), signal.SIGKILL)
        assert [agent.process.wait(150) for agent in both] == [0, 0], both[0].text() + both[1].text()
    assert sum(agent.text().count("going on at step") for agent in both) == 3
    assert_same_state(final_state(config.folder), final_state(undisturbed))
    assert numbers(config.folder) == numbers(undisturbed)


def test_an_agent_that_dies_is_survived_by_the_other_with_fewer_ranks(
    run: tuple[RunConfig, Path], tmp_path: Path, undisturbed: Path
) -> None:
    config, file = run
    options = ("--nnodes=1:2", "--rdzv-id=elastic", "--rdzv-conf=last_call_timeout=30")
    first, second = two_agents(tmp_path, file, *options)
    with agents(first, second):
        wait(lambda: last_step(config.folder) >= 20, first, second)
        (victim,) = second.workers().values()
        second.process.kill()
        os.kill(victim, signal.SIGKILL)
        assert first.process.wait(150) == 0, first.text()
    said = first.text() + second.text()
    assert "spread: 1 of 2 peers a rank, 1 rank a peer, 2 in all" in said
    assert "colocated: all peers on every rank, 1 rank a peer, 1 in all" in first.text()
    assert "going on at step" in first.text()
    assert_same_state(final_state(config.folder), final_state(undisturbed), relative=1e-3)
    assert [line["step"] for line in numbers(config.folder)] == [line["step"] for line in numbers(undisturbed)]


def uneven(tiny: Path, folder: Path, **placement: Any) -> RunConfig:
    peers = [
        {"network": "cifar_resnet8_b", "name": f"p{k}", "options": {"width": width}} for k, width in enumerate((4, 8))
    ]
    return small_run(
        tiny,
        folder,
        peers=peers,
        placement={"kind": "balanced", **placement},
        train={"epochs": 20, "timeout": 20.0},
        checkpoint={"every_steps": 3},
        evaluation={"every_epochs": 4},
        log={"every_steps": 1},
    )


def test_a_rank_of_uneven_ones_is_replaced(tiny: Path, tmp_path: Path) -> None:
    config = uneven(tiny, tmp_path / "run", ranks={"p0": 1, "p1": 2})
    (tmp_path / "run.yaml").write_text(dump(config))
    agent = Agent(tmp_path / "output", tmp_path / "run.yaml", *ALONE, "--nproc-per-node=3", "--max-restarts=1")
    with agents(agent):
        wait(lambda: last_step(config.folder) >= 10, agent)
        os.kill(agent.workers()[2], signal.SIGKILL)
        assert agent.process.wait(150) == 0, agent.text()
    assert agent.text().count("balanced: peer 0 on 1 rank, peer 1 on 2 ranks, 3 in all") == 2
    assert agent.text().count("going on at step") == 1
    run_ranks(3, train_here, config.model_copy(update={"dir": tmp_path / "undisturbed"}))
    assert_same_state(final_state(config.folder), final_state(tmp_path / "undisturbed"))
    assert numbers(config.folder) == numbers(tmp_path / "undisturbed")


def test_uneven_ranks_are_dealt_anew_where_a_machine_is_lost(tiny: Path, tmp_path: Path) -> None:
    """By the rule of the planner: the peers cost 1 : 3.7 or so."""
    config = uneven(tiny, tmp_path / "run")
    (tmp_path / "run.yaml").write_text(dump(config))
    options = ("--nnodes=1:2", "--rdzv-id=uneven", "--rdzv-conf=last_call_timeout=30")
    first, second = two_agents(tmp_path, tmp_path / "run.yaml", *options, ranks=2)
    with agents(first, second):
        wait(lambda: last_step(config.folder) >= 10, first, second)
        victims = second.workers().values()
        second.process.kill()
        for victim in victims:
            os.kill(victim, signal.SIGKILL)
        assert first.process.wait(240) == 0, first.text()
    said = first.text() + second.text()
    assert said.count("balanced: peer 0 on 1 rank, peer 1 on 3 ranks, 4 in all") == 1
    now = "4 ranks at the start before, 2 now: peers live as spread: 1 of 2 peers a rank, 1 rank a peer, 2 in all"
    assert first.text().count(now) == 1, first.text()
    assert "going on at step" in first.text()
    steps = [line["step"] for line in numbers(config.folder) if "train/p0/ce" in line]
    assert steps == list(range(1, 101))


def test_the_first_failure_is_what_one_reads_at_the_end(run: tuple[RunConfig, Path], tmp_path: Path) -> None:
    """A folder in the place of a file that rank 0 alone writes."""
    config, file = run
    config.folder.mkdir()
    (config.folder / "classes.json").mkdir()
    agent = Agent(tmp_path / "output", file, *ALONE, "--nproc-per-node=2")
    with agents(agent):
        assert agent.process.wait(90) == 1
    cause = agent.text().partition("Root Cause (first observed failure)")[2]
    assert "rank      : 0" in cause
    assert "IsADirectoryError" in cause


def test_a_rank_that_stopped_is_named_before_the_others_give_up(run: tuple[RunConfig, Path], tmp_path: Path) -> None:
    config, file = run
    agent = Agent(tmp_path / "output", file, *ALONE, "--nproc-per-node=2")
    with agents(agent):
        wait(lambda: last_step(config.folder) >= 20, agent)
        os.kill(agent.workers()[1], signal.SIGSTOP)
        wait(lambda: "warning: 3 s: Rank 1 does not answer; it was last heard of at" in agent.text(), agent)
        assert agent.process.wait(90) == 1
    assert "RankLostError: rank 0 of 2, " in agent.text()
    assert loading.newest(config.folder)[0] is not None


def test_no_rank_outlives_a_torchrun_that_was_killed(run: tuple[RunConfig, Path], tmp_path: Path) -> None:
    """It would write into the folder beside those that are started in its place."""
    config, file = run
    agent = Agent(tmp_path / "output", file, *ALONE, "--nproc-per-node=2")
    with agents(agent):
        wait(lambda: last_step(config.folder) >= 20, agent)
        workers = agent.workers().values()
        agent.process.kill()
        agent.process.wait()
        # What has ended has no command line, whether somebody has asked for its exit code or not.
        wait(lambda: not any(command(pid) for pid in workers), agent)


def command(pid: int) -> bytes:
    with contextlib.suppress(OSError):
        return Path(f"/proc/{pid}/cmdline").read_bytes()
    return b""

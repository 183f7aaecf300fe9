"""launch/ranks.py: torchrun, closed to other machines. Real processes."""

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

import pytest

from engine.config import RunConfig
from engine.config.loading import dump
from tests.kills import last_step
from tests.runs import small_run

ROOT = Path(__file__).parents[2]
COMMAND = (sys.executable, "launch/ranks.py", "--nproc-per-node=2")


@contextlib.contextmanager
def started(config: RunConfig, *options: str, out: Path | None = None) -> Iterator[subprocess.Popen[bytes]]:
    file = config.folder.parent / "run.yaml"
    file.write_text(dump(config))
    with (config.folder.parent / "output").open("w") as output, open(out or os.devnull, "w") as stdout:
        process = subprocess.Popen(
            [*COMMAND, *options, "launch/train.py", str(file)], cwd=ROOT, stdout=stdout, stderr=output
        )
        try:
            yield process
        finally:
            left = workers(process.pid)
            process.kill()
            process.wait()
            wait_until(lambda: not any(map(command, left)))


def workers(pid: int) -> list[int]:
    with contextlib.suppress(OSError):
        children = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
        return [int(child) for child in children if b"launch/train.py" in command(int(child))]
    return []


def command(pid: int) -> bytes:
    """Of a process that lives."""
    with contextlib.suppress(OSError):
        return Path(f"/proc/{pid}/cmdline").read_bytes()
    return b""


def wait_until(due: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 240
    while not due():
        assert time.monotonic() < deadline
        time.sleep(0.02)


def listens(pid: int) -> set[str]:
    """The addresses, in the kernel's hexadecimal, at which a process accepts connections."""
    mine = set()
    for path in Path(f"/proc/{pid}/fd").iterdir():
        with contextlib.suppress(OSError):
            mine.add(os.readlink(path))
    lines = [line.split() for t in ("tcp", "tcp6") for line in Path(f"/proc/net/{t}").read_text().splitlines()[1:]]
    return {f[1].partition(":")[0] for f in lines if f[3] == "0A" and f"socket:[{f[9]}]" in mine}


ALONE = """
import os, socket, torch
from engine.ranks.collectives import Launch, start
from tests.launch.test_ranks import listens
start(Launch(0, 0, 1), torch.device("cpu"))
print(socket.gethostbyname(socket.gethostname()), sorted(listens(os.getpid())))
"""


@pytest.mark.slow
def test_a_process_alone_listens_to_itself_wherever_the_name_of_its_machine_leads(tmp_path: Path) -> None:
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        try:
            probe.connect(("192.0.2.1", 9))  # which sends nothing
            address = probe.getsockname()[0]
        except OSError:
            pytest.skip("this machine is on no network")
    (tmp_path / "hosts").write_text(f"{address} somewhere\n")
    # A name and a table of names of its own, which take root.
    named = f"mount --bind {tmp_path}/hosts /etc/hosts && hostname somewhere && exec {sys.executable} -c '{ALONE}'"
    env = {name: value for name, value in os.environ.items() if name not in ("RANK", "GLOO_SOCKET_IFNAME")}
    done = subprocess.run(["unshare", "-um", "sh", "-c", named], cwd=ROOT, env=env, capture_output=True, text=True)
    if "unshare: unshare failed" in done.stderr:
        pytest.skip("no namespaces here")
    assert done.stdout == f"{address} ['0100007F']\n", done.stderr


def test_nobody_else_can_reach_it_a_rank_that_dies_is_replaced_and_sigusr1_saves(tiny: Path, tmp_path: Path) -> None:
    config = small_run(tiny, tmp_path / "run", train={"epochs": 2000}, log={"every_steps": 1})
    with started(config, "--max-restarts=1") as launcher:
        wait_until(lambda: last_step(config.folder) >= 2)
        first = workers(launcher.pid)
        assert len(first) == 2
        assert set.union(*(listens(pid) for pid in (launcher.pid, *first))) == {"0100007F"}
        os.kill(first[1], signal.SIGKILL)
        wait_until(lambda: bool(workers(launcher.pid)) and not set(first) & set(workers(launcher.pid)))
        before = last_step(config.folder)
        wait_until(lambda: last_step(config.folder) > before)
        launcher.send_signal(signal.SIGUSR1)
        # More of them, to the last moment of each process, change nothing.
        wait_until(lambda: "signal SIGUSR1" in (tmp_path / "output").read_text())
        while launcher.poll() is None:
            for pid in workers(launcher.pid):
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGTERM)
            time.sleep(0.005)
        assert launcher.returncode == 0, (tmp_path / "output").read_text()
    assert f"signal SIGUSR1 at step {last_step(config.folder)}: saved" in (tmp_path / "output").read_text()


def catches(pid: int, number: signal.Signals) -> bool:
    lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    caught = next(line for line in lines if line.startswith("SigCgt"))
    return bool(int(caught.split()[1], 16) >> (number - 1) & 1)


STOPS_BEFORE_TORCH = """
import os, signal, sys

class Stop:
    def find_spec(self, name, path=None, target=None):
        if name == "torch":
            sys.meta_path.remove(self)
            os.kill(os.getpid(), signal.SIGSTOP)

sys.meta_path.insert(0, Stop())
"""


def is_stopped(pid: int) -> bool:
    return "\nState:\tT" in Path(f"/proc/{pid}/status").read_text()


def test_a_signal_to_a_program_that_is_starting_saves_the_first_step(tiny: Path, tmp_path: Path) -> None:
    """Before torch is imported: there the program stops itself, so that the signal is not late on any machine."""
    config, preempted = small_run(tiny, tmp_path / "run"), tmp_path / "preempted"
    (tmp_path / "run.yaml").write_text(dump(config))
    (tmp_path / "sitecustomize.py").write_text(STOPS_BEFORE_TORCH)
    paths = os.pathsep.join([str(tmp_path), *filter(None, [os.environ.get("PYTHONPATH")])])
    command = [sys.executable, "launch/train.py", str(tmp_path / "run.yaml"), "--preempted", str(preempted)]
    environment = {**os.environ, "PYTHONPATH": paths}
    with subprocess.Popen(command, cwd=ROOT, env=environment, stderr=subprocess.PIPE, text=True) as process:
        wait_until(lambda: is_stopped(process.pid))
        assert catches(process.pid, signal.SIGTERM)
        process.terminate()
        process.send_signal(signal.SIGCONT)
        _, said = process.communicate(timeout=240)
    assert process.returncode == 0, said
    assert preempted.read_text() == "SIGTERM\n"
    assert "signal SIGTERM at step 1: saved" in said


@pytest.mark.slow
def test_a_launcher_that_waits_for_another_machine_says_so_and_ends_at_once(tiny: Path, tmp_path: Path) -> None:
    config = small_run(tiny, tmp_path / "run")
    output = tmp_path / "output"
    there = ("--nnodes=2", "--rdzv-backend=c10d", "--rdzv-endpoint=127.0.0.1:0")
    for number in (signal.SIGTERM, signal.SIGINT):
        with started(config, *there) as launcher:
            wait_until(lambda: f"waiting for other machines: {there[0]} {there[2]}, 1" in output.read_text())
            launcher.send_signal(number)
            assert launcher.wait(5) == -number


@pytest.mark.slow
def test_workers_whose_launcher_is_killed_while_they_are_starting_do_not_stay(tiny: Path, tmp_path: Path) -> None:
    config = small_run(tiny, tmp_path / "run", train={"epochs": 2000})
    with started(config) as launcher:
        wait_until(lambda: len(workers(launcher.pid)) == 2)
        left = workers(launcher.pid)
        time.sleep(0.5)
        launcher.kill()
        launcher.wait()
        wait_until(lambda: not any(map(command, left)))
    assert last_step(config.folder) == 0


@pytest.mark.slow
def test_a_complete_run_whose_output_is_full_says_so_and_ends_with_0(tiny: Path, tmp_path: Path) -> None:
    config = small_run(tiny, tmp_path / "run", train={"epochs": 1})
    with started(config, out=Path("/dev/full")) as launcher:
        assert launcher.wait(90) == 0, (tmp_path / "output").read_text()
    said = (tmp_path / "output").read_text()
    assert "the run is complete; the table on standard output could not be written: [Errno 28]" in said

"""Jobs on a real Slurm of two nodes: `make test-slurm` starts one and runs these."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from engine.config import RunConfig
from engine.config.loading import dump, load
from engine.reporting.tracking import read_metrics
from tests.kills import assert_same_state, final_state, last_step, numbers
from tests.launch.test_sweep import sweep_file
from tests.runs import small_run, train_here
from tests.worlds import run_ranks

pytestmark = [pytest.mark.slurm, pytest.mark.timeout(600)]

ROOT = Path(__file__).parents[2]
ON_TWO_NODES = ["--nodes=2", "--cpus-per-task=1", "--gpus-per-node=0"]


def slurm(*command: str) -> str:
    """What a command of Slurm's prints."""
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout


@pytest.fixture(scope="module", autouse=True)
def _cluster() -> Iterator[None]:
    if not shutil.which("sinfo") or subprocess.run(["sinfo"], capture_output=True).returncode:
        pytest.skip("no Slurm answers to sinfo; `make test-slurm` starts one on this machine")
    yield
    slurm("scancel", "--user", str(os.getuid()))


@pytest.fixture
def checkout(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The repository at another place, so that logs and runs of jobs fall there; the current folder."""
    folder = tmp_path / "checkout"
    folder.mkdir()
    for name in ("configs", "data_pipelines", "engine", "launch", "losses", "models", "slurm"):
        (folder / name).symlink_to(ROOT / name)
    monkeypatch.chdir(folder)
    for name, value in {
        "PYTHONPATH": str(folder),
        "PYTHON": sys.executable,
        "TORCHRUN": str(Path(sys.executable).with_name("torchrun")),
        "RANKS_PER_NODE": "1",
    }.items():
        monkeypatch.setenv(name, value)
    return folder


def submit(*arguments: str | Path) -> str:
    """slurm/submit.sh. Returns the number of the job."""
    out = slurm("bash", "slurm/submit.sh", *map(str, arguments))
    found = re.search(r"job (\d+) is in the queue\n  log:     (\S+)\n", out)
    assert found, out
    return found[1]


def show(job: str) -> dict[str, str]:
    """What Slurm knows of a job."""
    return dict(re.findall(r"(\w+)=(\S+)", slurm("scontrol", "--oneliner", "show", "job", job)))


def wait(due: Callable[[], bool], what: str, seconds: float = 200) -> None:
    deadline = time.monotonic() + seconds
    while not due():
        assert time.monotonic() < deadline, f"{what}: not within {seconds} s\n{slurm('squeue')}"
        time.sleep(0.1)


def wait_for_end(job: str, folder: Path) -> dict[str, str]:
    """Waits until a job is over, and prints its log."""
    wait(lambda: show(job)["JobState"] not in ("PENDING", "RUNNING", "COMPLETING", "CONFIGURING"), f"the end of {job}")
    for log in folder.glob("cohort-*.log"):
        print(log.read_text())
    return show(job)


def a_run(tiny: Path, folder: Path, epochs: int = 30, method: str = "dml") -> RunConfig:
    """Steps of a few ms, a line of metrics for each."""
    sections: dict[str, Any] = {"train": {"epochs": epochs}, "log": {"every_steps": 1}, "device": "cpu"}
    return small_run(tiny, folder, {"name": method}, **sections)


def on_disk(config: RunConfig, path: Path) -> Path:
    path.write_text(dump(config))
    return path


@pytest.fixture
def run(tiny: Path, checkout: Path) -> tuple[RunConfig, Path]:
    """A run of 150 steps, and its file."""
    config = a_run(tiny, checkout / "run")
    return config, on_disk(config, checkout / "run.yaml")


@pytest.fixture(scope="module")
def undisturbed(tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("undisturbed")
    run_ranks(2, train_here, a_run(tiny, folder))
    return folder


def assert_as_if_nothing_had_happened(config: RunConfig, undisturbed: Path) -> None:
    assert_same_state(final_state(config.folder), final_state(undisturbed))
    scores = [line for line in numbers(config.folder) if "val/disagreement" in line]
    assert scores == [line for line in numbers(undisturbed) if "val/disagreement" in line]
    steps = [line["step"] for line in numbers(config.folder) if "lr" in line]
    assert steps == list(range(1, 151))


def test_two_nodes_train_one_run_with_a_log_for_the_job_and_one_for_each_rank(
    run: tuple[RunConfig, Path], checkout: Path, undisturbed: Path
) -> None:
    config, file = run
    job = submit(file, *ON_TWO_NODES)
    assert wait_for_end(job, checkout)["JobState"] == "COMPLETED"
    assert_as_if_nothing_had_happened(config, undisturbed)
    log = (checkout / f"cohort-{job}.log").read_text()
    assert "spread: 1 of 2 peers a rank, 1 rank a peer, 2 in all" in log
    assert log.count("deployed: ") == 1
    for node in ("n1", "n2"):
        assert len(list((checkout / f"cohort-{job}" / node).rglob("stderr.log"))) == 1


def test_a_job_that_somebody_requeues_goes_on(run: tuple[RunConfig, Path], checkout: Path, undisturbed: Path) -> None:
    config, file = run
    job = submit(file, *ON_TWO_NODES)
    wait(lambda: last_step(config.folder) >= 20, "step 20")
    slurm("scontrol", "requeue", job)
    ended = wait_for_end(job, checkout)
    assert (ended["JobState"], ended["Restarts"]) == ("COMPLETED", "1")
    assert "going on at step" in (checkout / f"cohort-{job}.log").read_text()
    assert_as_if_nothing_had_happened(config, undisturbed)


def test_a_job_whose_node_goes_down_goes_on_when_there_are_nodes(
    run: tuple[RunConfig, Path], checkout: Path, undisturbed: Path
) -> None:
    config, file = run
    job = submit(file, *ON_TWO_NODES, "checkpoint.every_steps=7")
    wait(lambda: last_step(config.folder) >= 20, "step 20")
    slurm("scontrol", "update", "nodename=n2", "state=down", "reason=test")
    try:
        wait(lambda: show(job)["JobState"] == "PENDING", "the job in the queue again")
    finally:
        # Refused where the node has come back by itself, as it does where ReturnToService=2.
        subprocess.run(["scontrol", "update", "nodename=n2", "state=resume"], capture_output=True)
    ended = wait_for_end(job, checkout)
    assert (ended["JobState"], ended["Restarts"]) == ("COMPLETED", "1")
    assert_as_if_nothing_had_happened(config, undisturbed)


def test_a_job_whose_time_is_up_saves_and_goes_back_into_the_queue_until_it_is_complete(
    tiny: Path, checkout: Path, tmp_path: Path
) -> None:
    config = a_run(tiny, checkout / "run", epochs=500)
    file = on_disk(config, checkout / "run.yaml")
    quiet = ["log.every_steps=5", "evaluation.every_epochs=100", "checkpoint.every_epochs=500"]
    # A minute is Slurm's least; the signal comes 25 s after the start, or as much earlier as Slurm likes.
    job = submit(file, *ON_TWO_NODES, "--time=1", "--signal=B:USR1@35", *quiet)
    wait(lambda: int(show(job)["Restarts"]) >= 1, "the job in the queue again")
    folder = config.folder
    log = checkout / f"cohort-{job}.log"
    told = re.findall(r"signal SIGUSR1 at step (\d+): saved", log.read_text())
    assert len(told) == 1, log.read_text()
    assert [line["step"] for line in read_metrics(folder)][-1] == int(told[0])
    assert "the time is up; back into the queue" in log.read_text()
    slurm("scontrol", "update", f"JobId={job}", "TimeLimit=10")
    ended = wait_for_end(job, checkout)
    assert ended["JobState"] == "COMPLETED"
    run_ranks(2, train_here, load(file, [*quiet, f"dir={tmp_path / 'undisturbed'}"]))
    assert_same_state(final_state(folder), final_state(tmp_path / "undisturbed"))


def test_a_job_that_somebody_ends_is_saved_and_stays_ended(run: tuple[RunConfig, Path], checkout: Path) -> None:
    config, file = run
    job = submit(file, *ON_TWO_NODES)
    wait(lambda: last_step(config.folder) >= 20, "step 20")
    slurm("scancel", "--signal=TERM", job)
    ended = wait_for_end(job, checkout)
    assert ended["Restarts"] == "0"
    assert re.search(r"signal SIGTERM at step \d+: saved", (checkout / f"cohort-{job}.log").read_text())


def test_a_config_that_cannot_be_split_over_the_nodes_is_not_submitted(
    run: tuple[RunConfig, Path], checkout: Path
) -> None:
    before = slurm("squeue", "--noheader")
    for nodes in (["--nodes=7"], ["--nodes", "7"], ["-N", "7"], ["-N7"]):
        done = subprocess.run(
            [
                "bash",
                "slurm/submit.sh",
                run[1],
                *nodes,
                "--gpus-per-node=1",
                "placement.kind=colocated",
                "data.global_batch=6",
            ],
            capture_output=True,
            text=True,
        )
        assert done.returncode == 2
        assert "data.global_batch = 6: 7 replicas x 1 micro-batches do not get a row each" in done.stderr
        assert done.stderr.endswith("not submitted\n")
    assert slurm("squeue", "--noheader") == before
    assert not list(checkout.glob("cohort-*"))


def test_an_array_trains_each_config_with_each_seed(tiny: Path, checkout: Path) -> None:
    folder = checkout / "small"
    folder.mkdir()
    for method in ("dml", "independent"):
        text = dump(a_run(tiny, checkout, method=method))
        (folder / f"{method}.yaml").write_text(re.sub(r"^dir: .*\n", "", text, flags=re.MULTILINE))
    files = [folder / "dml.yaml", folder / "independent.yaml"]
    options = ["--nodes=1", "--cpus-per-task=1", "--gpus-per-node=0", "train.epochs=2"]
    job = submit(*files, "seeds=3,5", *options)
    wait(lambda: not slurm("squeue", "--noheader", "--job", job), "the end of the array")
    for method in ("dml", "independent"):
        for seed in (3, 5):
            run = checkout / "runs" / f"small-{method}-seed{seed}"
            config = load(run / "config.yaml")
            assert config.seed == seed
            assert (run / "table.txt").exists()


def test_a_sweep_is_an_array_of_its_runs_and_shows_how_far_they_are(tiny: Path, checkout: Path) -> None:
    file = sweep_file(tiny, checkout, dir="sweep", seeds=[3, 5])
    sweep = [sys.executable, "launch/sweep.py", str(file)]
    options = ["--slurm", "--nodes=1", "--cpus-per-task=1", "--gpus-per-node=0"]
    found = re.findall(r"job (\d+) is in the queue", slurm(*sweep, *options))
    assert len(found) == 1
    wait(lambda: not slurm("squeue", "--noheader", "--job", found[0]), "the end of the array")
    assert len(list(checkout.glob(f"cohort-{found[0]}_*.log"))) == 4
    shown = slurm(*sweep, "--show")
    for method in ("independent", "dml"):
        for seed in (3, 5):
            name = f"{method}-r8-seed{seed}"
            assert re.search(rf"^{name} +complete +2 ", shown, re.MULTILINE), shown
            config = load(checkout / "sweep" / name / "config.yaml")
            assert (config.name, config.seed, config.method.name) == (f"small-{name}", seed, method)
    again = slurm(*sweep, *options)
    assert "all runs are complete" in again
    assert "is in the queue" not in again


def test_paths_are_those_of_whoever_submits(tiny: Path, checkout: Path, tmp_path: Path) -> None:
    own = tmp_path / "own"
    own.mkdir()
    on_disk(a_run(tiny, Path("from_the_config"), 1), own / "mine.yaml")
    (own / "data").symlink_to(tiny)
    options = ["--nodes=1", "--cpus-per-task=1", "--gpus-per-node=0", "data.root=data"]
    submit_here = ["bash", str(checkout / "slurm" / "submit.sh"), "mine.yaml", *options]
    for more, folder in (["dir=out/run"], "out/run"), ([], "from_the_config"), (["seeds=3"], "runs/own-mine-seed3"):
        if more == ["seeds=3"]:
            on_disk(a_run(tiny, Path("x"), 1).model_copy(update={"dir": None}), own / "mine.yaml")
        out = subprocess.run([*submit_here, *more], cwd=own, capture_output=True, text=True, check=True).stdout
        job = out.split()[out.split().index("job") + 1]
        wait(lambda job=job: not slurm("squeue", "--noheader", "--job", job), "the end of the job")
        assert (own / folder / "table.txt").is_file(), out
    assert len(list(own.glob("cohort-*.log"))) == 3
    assert not list(checkout.glob("cohort-*"))
    assert not (checkout / "runs").exists()


def test_a_job_scores_a_run(tiny: Path, checkout: Path) -> None:
    config = a_run(tiny, checkout / "run", 1)
    run_ranks(1, train_here, config)
    options = ["--gpus-per-node=0", "--cpus-per-task=1", "--nodes=2"]
    job = slurm("sbatch", "--parsable", *options, "slurm/evaluate.sbatch", "run", "--json", "scores.json").strip()
    assert wait_for_end(job, checkout)["JobState"] == "COMPLETED"
    assert "run, step 5, 37 images, spread" in (checkout / f"cohort-{job}.log").read_text()
    assert (checkout / "scores.json").exists()

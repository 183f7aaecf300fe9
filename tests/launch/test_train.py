"""launch/train.py: what its options print, and that starting over never deletes."""

from __future__ import annotations

import importlib
import os
import re
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import wandb

from engine import trainer
from engine.config.loading import describe, load
from engine.reporting.tracking import read_metrics
from engine.safety import checkpoint
from launch.train import main
from tests.engine.reporting.test_tracking import wandb_records
from tests.kills import assert_same_state, final_state, numbers
from tests.worlds import run_ranks

CONFIG = """\
name: small
dir: {at}/run
device: cpu
method: {{name: dml}}
peers: [{{network: cifar_resnet8_b, copies: 2, options: {{width: 4}}}}]
data: {{dataset: fashion_mnist, root: {data}, global_batch: 24}}
train: {{epochs: 1}}
log: {{progress: false, every_steps: 1}}
"""

Outcome = tuple[str, str]


@pytest.fixture
def config(tiny: Path, tmp_path: Path) -> Path:
    path = tmp_path / "small.yaml"
    path.write_text(CONFIG.format(at=tmp_path, data=tiny))
    return path


@pytest.fixture
def command(monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> Callable[..., Outcome]:
    """launch/train.py in this process, to a good end: stdout, stderr."""

    def run(*arguments: str | Path) -> Outcome:
        monkeypatch.setattr(sys, "argv", ["launch/train.py", *map(str, arguments)])
        main()
        out, err = capfd.readouterr()
        return out, err

    return run


@pytest.mark.parametrize(
    ("found", "size"),
    [
        ({"SLURM_PROCID": "1", "SLURM_NTASKS": "2"}, "SLURM_NTASKS"),
        ({"SLURM_PROCID": "1", "SLURM_NTASKS": "1", "SLURM_STEP_NUM_TASKS": "2"}, "SLURM_STEP_NUM_TASKS"),
        ({"OMPI_COMM_WORLD_RANK": "0", "OMPI_COMM_WORLD_SIZE": "2"}, "OMPI_COMM_WORLD_SIZE"),
    ],
)
@pytest.mark.parametrize("command", ["train", "evaluate"])
def test_one_of_several_tasks_without_torchrun_is_refused_with_what_to_type(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str], found: dict[str, str], size: str, command: str
) -> None:
    for name, value in found.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(sys, "argv", ["launch", "configs/fashion_mnist/quickstart_dml.yaml"])
    with pytest.raises(SystemExit, match="2"):
        importlib.import_module(f"launch.{command}").main()
    said = capfd.readouterr().err
    assert said.startswith(f"error: {size} = 2: each of these 2 tasks would train alone, as rank 0, in one folder.")
    assert "torchrun --nnodes=NODES --nproc-per-node=GPUS --rdzv-backend=c10d" in said


def train_with(*arguments: str) -> None:
    """launch/train.py on a rank of a test's world."""
    sys.argv = ["launch/train.py", *arguments]
    main()


def test_print_config_prints_what_loads_as_the_same_config(
    config: Path, tmp_path: Path, command: Callable[..., Outcome]
) -> None:
    overrides = ["train.epochs=7", "optimizer.lr=1e-4", "peers.0.options.width=8"]
    out, err = command(config, *overrides, "--print-config")
    (tmp_path / "again.yaml").write_text(out)
    assert err == ""
    assert load(tmp_path / "again.yaml") == load(config, overrides)
    assert command(tmp_path / "again.yaml", "--print-config") == (out, "")
    assert not (tmp_path / "run").exists()


def test_check_says_what_would_run_and_writes_nothing(
    config: Path, tmp_path: Path, command: Callable[..., Outcome]
) -> None:
    before = sorted(tmp_path.rglob("*"))
    said, errors = command(config, "--check")
    first, data, steps, peers, memory = said.splitlines()
    assert first == "small: dml; colocated: all peers on every rank, 1 rank a peer, 1 in all"
    assert data == "  data       120 images of 10 classes to train on, 37 to validate; 28 pixels"
    assert steps == "  steps      5 an epoch of 24 images, 24 a rank; 5 in all"
    assert peers == "  peers here cifar_resnet8_b-0 (0.01 M parameters), cifar_resnet8_b-1 (0.01 M parameters)"
    assert re.match(r"  memory     \d+\.\d MiB a rank at the peak of a step: weights .*, activations ", memory)
    assert errors == ""
    assert sorted(tmp_path.rglob("*")) == before


def test_check_for_other_machines_asks_nothing_of_this_one(
    config: Path,
    tmp_path: Path,
    command: Callable[..., Outcome],
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    on_gpus = ["device=cuda", "train.sync_bn=true", "placement.kind=colocated"]
    said, errors = command(config, *on_gpus, "--check", "--ranks", "4")
    assert said.startswith("small: dml; colocated: all peers on every rank, 4 ranks a peer, 4 in all\n")
    assert errors == ""
    for arguments, message in (
        (
            [*on_gpus, "--check", "--ranks", "25"],
            "global_batch = 24: 25 replicas x 1 micro-batches do not get a row each",
        ),
        (["train.sync_bn=true", "--check", "--ranks", "2"], "train.sync_bn = True: works on CUDA devices only"),
        (["--check", "--ranks", "0"], "--ranks 0: expected a number of ranks, 1 or more, together with --check"),
        (["--ranks", "2"], "--ranks 2: expected a number of ranks, 1 or more, together with --check"),
    ):
        monkeypatch.setattr(sys, "argv", ["launch/train.py", str(config), *arguments])
        with pytest.raises(SystemExit, match="2"):
            main()
        assert message in capfd.readouterr().err
    assert not (tmp_path / "run").exists()


def test_a_run_that_a_signal_ended_prints_no_table_and_says_so_to_scripts(
    config: Path, tmp_path: Path, command: Callable[..., Outcome], monkeypatch: pytest.MonkeyPatch
) -> None:
    train_step, preempted = trainer.train_step, tmp_path / "preempted"

    def interrupted(*arguments: Any) -> Any:
        # wandb, which starts beside training, is waited for a few seconds after a signal and no longer.
        deadline = time.monotonic() + 240
        while wandb.run is None and time.monotonic() < deadline:
            time.sleep(0.01)
        os.kill(os.getpid(), signal.SIGTERM)
        return train_step(*arguments)

    monkeypatch.setattr(trainer, "train_step", interrupted)
    out, err = command(config, "log.wandb=offline", "--preempted", preempted)
    assert out == ""
    # Asked in the first step, agreed on in the second.
    said = r"signal SIGTERM at step 2: saved, ended \d+\.\d s later; start the same command again to go on\n"
    assert re.search(said, err), err
    assert preempted.read_text() == "SIGTERM\n"
    assert not (tmp_path / "run" / "table.txt").exists()
    (written,) = (tmp_path / "run" / "wandb").glob("offline-run-*/run-*.wandb")
    assert [record.WhichOneof("record_type") for record in wandb_records(written)].count("preempting") == 1

    monkeypatch.setattr(trainer, "train_step", train_step)
    out, err = command(config, "--preempted", preempted)
    assert "going on at step 2 of 5" in err
    assert "deployed:" in out
    assert not preempted.exists()


def test_keys_lists_every_key_with_a_meaning(command: Callable[..., Outcome]) -> None:
    out, _ = command("--keys")
    assert out == describe() + "\n"
    lines = out.splitlines()
    keys = {line.split(" = ")[0] for line in lines[::2]}
    assert keys >= {
        "name",
        "seed",
        "method.temperature",
        "peers.N.network",
        "data.dataset",
        "train.epochs",
        "log.wandb",
    }
    for key, meaning in zip(lines[::2], lines[1::2], strict=True):
        assert re.fullmatch(r"[a-zA-Z0-9_.]+( = .*)?", key), key
        assert re.fullmatch(r"    \S.{5,}", meaning), f"{key}: {meaning}"


def test_a_run_ends_with_a_table_and_the_place_of_the_curves(
    config: Path, tmp_path: Path, command: Callable[..., Outcome]
) -> None:
    out, _ = command(config)
    run = tmp_path / "run"
    table = f"\n{(run / 'table.txt').read_text()}\n"
    assert out.startswith(table)
    took, kept, after = out.removeprefix(table).splitlines()
    assert re.fullmatch(
        r"took   0:\d\d:\d\d; [\d,]+ images/s, of a step data \d+ %, forward \d+ %, exchange \d+ %, backward \d+ %, "
        r"optimizer \d+ %; at most [\d,]+ MiB on rank 0",
        took,
    )
    files = "config.yaml, metrics.jsonl, table.txt, curves.png"
    assert kept == f"kept   {run}: {files}, checkpoint of step 5"
    assert after == f"next   python launch/evaluate.py {run} --confusion confusion.csv; python launch/export.py {run}"
    assert {path.name for path in run.iterdir()} >= {
        *("config.yaml", "starts.json", "metrics.jsonl", "checkpoints", "table.txt", "curves.png"),
    }


def test_fresh_moves_the_earlier_run_aside_and_deletes_nothing(
    config: Path, tmp_path: Path, command: Callable[..., Outcome]
) -> None:
    command(config)
    run = tmp_path / "run"
    before = {path.relative_to(run): path.read_bytes() for path in run.rglob("*") if path.is_file()}
    # With another seed, which would be refused without --fresh.
    _, err = command(config, "seed=1", "--fresh")
    aside = [path for path in tmp_path.iterdir() if path.name.startswith("run.")]
    assert len(aside) == 1
    assert f"the earlier run is now in {aside[0]}\n" in err
    assert {path.relative_to(aside[0]): path.read_bytes() for path in aside[0].rglob("*") if path.is_file()} == before
    assert load(run / "config.yaml").seed == 1
    assert [line["step"] for line in read_metrics(run)] == [1, 2, 3, 4, 5, 5]


def test_fresh_without_an_earlier_run_is_an_ordinary_start(
    config: Path, tmp_path: Path, command: Callable[..., Outcome]
) -> None:
    _, err = command(config, "--fresh")
    assert "earlier run" not in err
    assert sorted(path.name for path in tmp_path.iterdir()) == ["run", "small.yaml"]


def test_fresh_on_several_ranks_moves_once_and_no_rank_minds_the_earlier_run(config: Path, tmp_path: Path) -> None:
    """Rank 1 must not read the earlier run's config, or find it half moved."""
    run_ranks(2, train_with, str(config))
    run_ranks(2, train_with, str(config), "seed=1", "--fresh")
    assert len([path for path in tmp_path.iterdir() if path.name.startswith("run.")]) == 1
    assert load(tmp_path / "run" / "config.yaml").seed == 1


@pytest.mark.parametrize("name", ["TORCHELASTIC_RESTART_COUNT", "SLURM_RESTART_COUNT"])
def test_fresh_does_not_start_over_when_a_scheduler_restarts_the_command(
    config: Path, tmp_path: Path, command: Callable[..., Outcome], monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    command(config, "--fresh")
    state = final_state(tmp_path / "run")
    monkeypatch.setenv(name, "1")
    _, err = command(config, "--fresh")
    assert "complete at step 5 of 5" in err
    assert_same_state(final_state(tmp_path / "run"), state)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["run", "small.yaml"]


@pytest.mark.parametrize("option", [["--check"], ["optimizer.name=sdg"]])
def test_fresh_leaves_the_earlier_run_where_it_is_if_nothing_is_trained(
    config: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, option: list[str]
) -> None:
    run = tmp_path / "run"
    run.mkdir()
    (run / "config.yaml").write_text("an earlier run")
    monkeypatch.setattr(sys, "argv", ["launch/train.py", str(config), "--fresh", *option])
    if option == ["--check"]:
        main()
    else:
        with pytest.raises(SystemExit, match="2"):
            main()
    assert (run / "config.yaml").read_text() == "an earlier run"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["run", "small.yaml"]


def test_the_same_command_again_goes_on_where_the_run_was(
    config: Path, tmp_path: Path, command: Callable[..., Outcome]
) -> None:
    command(config, "schedule.name=constant")
    command(config, "schedule.name=constant", "train.epochs=2")
    command(config, "schedule.name=constant", "train.epochs=2", f"dir={tmp_path}/whole")
    assert checkpoint.steps_on_disk(tmp_path / "run")[-1] == 10
    assert_same_state(final_state(tmp_path / "run"), final_state(tmp_path / "whole"))
    assert numbers(tmp_path / "run") == numbers(tmp_path / "whole")


def test_a_world_without_a_rank_is_refused_at_once(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setattr(sys, "argv", ["launch", "configs/fashion_mnist/quickstart_dml.yaml"])
    with pytest.raises(SystemExit, match="2"):
        main()
    assert "error: WORLD_SIZE = 2 without RANK: expected both" in capfd.readouterr().err

"""Promise 6: nothing is guessed. Every mistake ends with exit code 2 and one message that says what to write."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import yaml

from launch.train import main
from tests.launch.mistakes import CONFIG, FILES, GET_FASHION, JOBS, OF_JOBS, OVERRIDES
from tests.runs import small_run, train_here

ROOT = Path(__file__).parents[2]


Outcome = tuple[int, str, str]


@pytest.fixture
def at(tiny: Path, tmp_path: Path) -> Path:
    """A folder with a config, small.yaml, that would run, and its data."""
    shutil.copytree(tiny, tmp_path / "data")
    (tmp_path / "circle").symlink_to(tmp_path / "circle")
    (tmp_path / "small.yaml").write_text(CONFIG.format(at=tmp_path))
    return tmp_path


@pytest.fixture
def command(monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> Callable[..., Outcome]:
    """launch/train.py in this process: exit code, stdout, stderr."""

    def run(*arguments: str | Path) -> Outcome:
        monkeypatch.setattr(sys, "argv", ["launch/train.py", *map(str, arguments)])
        with pytest.raises(SystemExit) as end:
            main()
        out, err = capfd.readouterr()
        return int(end.value.code or 0), out, err

    return run


def test_tuples_of_a_class_are_not_torn_apart(at: Path, command: Callable[..., Outcome]) -> None:
    """24 rows are 6 tuples of 4, too few for 7 micro-batches."""
    arguments = ("train.accumulation=7", "data.sampler=class_balanced", "data.images_per_class=4")
    message = (
        "error: data.global_batch = 24: 1 replicas x 7 micro-batches do not get a whole tuple of 4 images of a class "
        "each; expected at least 28\n"
    )
    assert command(at / "small.yaml", *arguments) == (2, "", message)


@pytest.mark.parametrize("mistake", OVERRIDES)
def test_mistake(at: Path, command: Callable[..., Outcome], mistake: str) -> None:
    override, message = (text.replace("{at}", str(at)) for text in OVERRIDES[mistake])
    assert command(at / "small.yaml", override) == (2, "", f"error: {message}\n")
    assert not (at / "run").exists()
    assert not dist.is_initialized()


def test_the_config_that_the_mistakes_are_made_in_is_right(
    at: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["launch/train.py", str(at / "small.yaml"), "--check"])
    main()
    said = capfd.readouterr().out.splitlines()[0]
    assert said == "small: dml; colocated: all peers on every rank, 1 rank a peer, 1 in all"


def test_unknown_method(at: Path, command: Callable[..., Outcome]) -> None:
    code, out, err = command(at / "small.yaml", "method.name=dmll")
    assert (code, out) == (2, "")
    assert err.startswith("error: method.name = 'dmll': expected one of independent, dml")
    assert err.endswith("; did you mean 'dml'?\n")


def test_several_mistakes_are_told_at_once(at: Path, command: Callable[..., Outcome]) -> None:
    told = "error: seed = -1: expected a value greater than or equal to 0\ntrain.epochs = 'x': expected an integer\n"
    assert command(at / "small.yaml", "train.epochs=x", "seed=-1") == (2, "", told)


def test_cuda_where_there_is_none(at: Path, command: Callable[..., Outcome]) -> None:
    if torch.cuda.is_available():
        pytest.skip("this machine has CUDA")
    message = "error: device = cuda: this machine has no CUDA device; expected cpu or auto here\n"
    assert command(at / "small.yaml", "device=cuda") == (2, "", message)


def test_accumulation_with_peers_updated_in_turn(at: Path, command: Callable[..., Outcome]) -> None:
    message = (
        "error: train.accumulation = 2: peers that are updated in turn (method.order = sequential) need a whole batch "
        "at once; expected 1\n"
    )
    assert command(at / "small.yaml", "train.accumulation=2", "method.order=sequential") == (2, "", message)


@pytest.mark.parametrize("mistake", OF_JOBS)
def test_mistake_in_a_job_of_one_peer(at: Path, command: Callable[..., Outcome], mistake: str) -> None:
    override, message = (text.replace("{at}", str(at)) for text in OF_JOBS[mistake])
    (at / "jobs.yaml").write_text(JOBS.format(at=at))
    assert command(at / "jobs.yaml", override) == (2, "", f"error: {message}\n")
    assert not (at / "run").exists()
    assert not (at / "meeting").exists()


def test_two_runs_that_would_meet_in_one_folder(
    at: Path, command: Callable[..., Outcome], monkeypatch: pytest.MonkeyPatch
) -> None:
    (at / "jobs.yaml").write_text(JOBS.format(at=at))
    job = (at / "jobs.yaml", "placement.peer=cifar_resnet8_b-1", "method.interval=5", "train.epochs=1")
    monkeypatch.setattr(sys, "argv", ["launch/train.py", *map(str, job)])
    main()
    left = at / "meeting" / "cifar_resnet8_b-1.safetensors"
    before = left.read_bytes()
    code, _, err = command(*job, "optimizer.lr=0.2", f"dir={at}/other")
    assert code == 2
    assert err.splitlines()[-1] == (
        f"error: placement.meeting = '{at}/meeting': {left} is of a run with optimizer.lr = 0.1; give this one another "
        "folder, or start over with --fresh, which replaces that file"
    )
    assert left.read_bytes() == before
    assert not (at / "other").exists()


def test_a_job_in_the_folder_of_another(
    at: Path, command: Callable[..., Outcome], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Jobs have folders of their own; who renames one into another's place is told."""
    (at / "jobs.yaml").write_text(JOBS.format(at=at))
    job = (at / "jobs.yaml", "placement.peer=cifar_resnet8_b-1", "train.epochs=1")
    monkeypatch.setattr(sys, "argv", ["launch/train.py", *map(str, job)])
    main()
    (at / "run" / "cifar_resnet8_b-1").rename(at / "run" / "cifar_resnet8_b-0")
    code, _, err = command(at / "jobs.yaml", "placement.peer=cifar_resnet8_b-0", "train.epochs=1")
    assert code == 2
    assert err.splitlines()[-1] == (
        f"error: placement.peer = 'cifar_resnet8_b-0': the run in {at}/run/cifar_resnet8_b-0 was started with "
        "'cifar_resnet8_b-1'; give this one another name= or dir=, or start over with --fresh, which moves that folder "
        "aside"
    )


@pytest.mark.parametrize("mistake", FILES)
def test_mistake_in_a_file(at: Path, command: Callable[..., Outcome], mistake: str) -> None:
    text, message = FILES[mistake]
    file = at / "bad.yaml"
    file.write_text(text)
    message = message.replace("{file}", str(file)).replace("{at}", str(at))
    assert command(file) == (2, "", f"error: {message}\n")


def test_missing_config(at: Path, command: Callable[..., Outcome]) -> None:
    message = f"error: {at}/samll.yaml: cannot be read: No such file or directory; did you mean 'small.yaml'?\n"
    assert command(at / "samll.yaml") == (2, "", message)


def test_config_is_a_folder(at: Path, command: Callable[..., Outcome]) -> None:
    assert command(at) == (2, "", f"error: {at}: cannot be read: Is a directory\n")


USAGE = "usage: train.py [-h] [--print-config] [--check] [--ranks N] [--keys] [--fresh] [--preempted FILE] [CONFIG ...]"


def told(outcome: Outcome) -> tuple[int, str, str]:
    code, out, err = outcome
    return code, out, " ".join(err.split())


def test_no_config(command: Callable[..., Outcome]) -> None:
    message = "CONFIG is missing; expected a YAML file, such as configs/fashion_mnist/quickstart_dml.yaml"
    assert told(command()) == (2, "", f"error: {message} {USAGE}")


def test_unknown_option(at: Path, command: Callable[..., Outcome]) -> None:
    message = "unrecognized arguments: --chek; did you mean '--check'?"
    assert told(command(at / "small.yaml", "--chek")) == (2, "", f"error: {message} {USAGE}")


def test_an_option_is_not_guessed_from_its_beginning(at: Path, command: Callable[..., Outcome]) -> None:
    """--fre would move a folder aside."""
    message = "unrecognized arguments: --fre; did you mean '--fresh'?"
    assert told(command(at / "small.yaml", "--fre")) == (2, "", f"error: {message} {USAGE}")


@pytest.mark.parametrize(
    "words",
    [
        ["CONFIG", "--print-config", "optimizer.lr=0.03", "train.epochs=7", "name=20240101"],
        ["--print-config", "optimizer.lr=0.03", "CONFIG", "--train.epochs=7", "--name", "20240101"],
        ["--optimizer.lr", "0.03", "--print-config", "--name=20240101", "CONFIG", "train.epochs=7"],
    ],
)
def test_values_stand_anywhere_and_as_other_programs_write_them(
    at: Path, words: list[str], monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    config = str(at / "small.yaml")
    monkeypatch.setattr(sys, "argv", ["launch/train.py", *(config if word == "CONFIG" else word for word in words)])
    main()
    found = yaml.safe_load(capfd.readouterr().out)
    assert (found["optimizer"]["lr"], found["train"]["epochs"], found["name"]) == (0.03, 7, "20240101")


def test_a_key_without_a_value_is_no_option(at: Path, command: Callable[..., Outcome]) -> None:
    message = "--optimizer.lr: expected a value, such as --optimizer.lr=VALUE"
    for words in (["--optimizer.lr"], ["--optimizer.lr", "train.epochs=3"], ["--optimizer.lr", "--check"]):
        assert told(command(at / "small.yaml", *words)) == (2, "", f"error: {message} {USAGE}")


@pytest.mark.parametrize(
    ("word", "meant"),
    [
        ("data.batch_size=8", "data.global_batch"),
        ("epochs=8", "train.epochs"),
        ("lr=0.1", "optimizer.lr"),
        ("optimizer.learning_rate=0.1", "optimizer.lr"),
        ("train.lr=0.1", "optimizer.lr"),
        ("data.workers=2", "data.decoding.threads"),
        ("output_dir=x", "dir"),
    ],
)
def test_what_other_trainers_call_a_key_is_understood(
    at: Path, command: Callable[..., Outcome], word: str, meant: str
) -> None:
    code, _, err = command(at / "small.yaml", word)
    assert code == 2
    assert f"unknown key; did you mean {meant!r}?" in err


def test_data_file_cut_short(at: Path, command: Callable[..., Outcome]) -> None:
    path = at / "data" / "train-labels-idx1-ubyte.gz"
    path.write_bytes(path.read_bytes()[:-5])
    code, out, err = command(at / "small.yaml")
    assert (code, out) == (2, "")
    assert err.startswith(f"error: data: {path} ")
    assert f"expected {8 + 120} bytes, found " in err
    assert err.endswith(f". {GET_FASHION}\n")


# -- runs that are there already --------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def trained_once(tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of small.yaml."""
    folder = tmp_path_factory.mktemp("trained")
    train_here(small_run(tiny, folder, optimizer={"lr": 0.1}))
    return folder


@pytest.fixture
def trained(trained_once: Path, at: Path) -> Path:
    """`at`, with that run in its folder."""
    shutil.copytree(trained_once, at / "run")
    return at


@pytest.mark.parametrize(
    ("override", "key", "now", "before"),
    [
        ("seed=1", "seed", "1", "0"),
        ("optimizer.lr=0.2", "optimizer.lr", "0.2", "0.1"),
        ("data.global_batch=12", "data.global_batch", "12", "24"),
        ("method={name: independent}", "method.name", "'independent'", "'dml'"),
    ],
)
def test_same_folder_with_a_changed_key(
    trained: Path, command: Callable[..., Outcome], override: str, key: str, now: str, before: str
) -> None:
    left = {path: path.read_bytes() for path in (trained / "run").rglob("*") if path.is_file()}
    meant = "; if that is meant, checkpoint.recipe_may_change=true goes on with it" if key == "optimizer.lr" else ""
    message = (
        f"error: {key} = {now}: the run in {trained}/run was started with {before}; give this one another name= or "
        f"dir=, or start over with --fresh, which moves that folder aside{meant}\n"
    )
    assert command(trained / "small.yaml", override) == (2, "", message)
    assert {path: path.read_bytes() for path in (trained / "run").rglob("*") if path.is_file()} == left


def test_checkpoint_of_other_peers(trained: Path, command: Callable[..., Outcome]) -> None:
    (trained / "run" / "config.yaml").unlink()
    code, out, err = command(trained / "small.yaml", "peers.0.name=other")
    assert (code, out) == (2, "")
    assert err == (
        f"error: peers.0.name = 'other': the run in {trained}/run was started with None; give this one another name= "
        "or dir=, or start over with --fresh, which moves that folder aside\n"
    )


def test_resolved_config_damaged(trained: Path, command: Callable[..., Outcome]) -> None:
    (trained / "run" / "config.yaml").write_text("name: [\n")
    code, out, err = command(trained / "small.yaml")
    assert (code, out) == (2, "")
    assert err.startswith(f"error: {trained}/run/config.yaml: not valid YAML: while parsing a flow node")


# -- real processes ---------------------------------------------------------------------------------------------------


def python(*arguments: str | Path, **environment: str) -> Outcome:
    done = subprocess.run(
        [sys.executable, *map(str, arguments)],
        cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1", **environment},
        capture_output=True,
        text=True,
        timeout=240,
    )
    return done.returncode, done.stdout, done.stderr


def test_one_message_and_exit_code_2_from_a_process(at: Path) -> None:
    message = "error: train.epochs = 'many': expected an integer\n"
    assert python("launch/train.py", at / "small.yaml", "train.epochs=many") == (2, "", message)


def test_a_rank_that_refuses_waits_for_no_other(at: Path) -> None:
    """Of a world of 2 only rank 0 is there: whoever joins a process group before the checks would hang."""
    world = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "1"}
    message = "error: data.global_batch = 1: 2 replicas x 1 micro-batches do not get a row each; expected at least 2\n"
    arguments = ("launch/train.py", at / "small.yaml", "data.global_batch=1", "placement.kind=colocated")
    assert python(*arguments, **world) == (2, "", message)


def test_under_torchrun_the_message_is_printed_once(at: Path) -> None:
    code, out, err = python(
        *("-m", "torch.distributed.run", "--nnodes=1", "--nproc-per-node=2", "--rdzv-backend=c10d"),
        *("--rdzv-endpoint=127.0.0.1:0", "launch/train.py", at / "small.yaml", "peers.0.network=cifar_resnet9_b"),
    )
    assert code == 1, "torchrun's own"
    assert out == ""
    message = "error: peers.0: network 'cifar_resnet9_b': depth 9 is not 6n+2 with n >= 1; nearest: 8, 14\n"
    assert err.count("depth 9 is not") == err.count(message) == 1
    assert "exitcode  : 2" in err
    assert "RuntimeError" not in err
    assert not (at / "run").exists()


def test_the_table_holds_at_least_thirty_mistakes() -> None:
    everything: dict[str, Any] = {**OVERRIDES, **FILES}
    assert len(everything) >= 30
    assert len({message for _, message in everything.values()}) == len(everything)

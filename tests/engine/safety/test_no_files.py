"""A pipe, a link or a device in the place of a file in a run's folder neither holds a run up nor is written through."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from engine.config import RunConfig
from tests.checkpoints import a_run
from tests.runs import train_here
from tests.worlds import run_ranks

SECRET = b"what somebody else has written"

NAMES = ("config.yaml", "starts.json", "metrics.jsonl", "owner/1", "classes.json")
"""In the place of these whatever stands there would be read or written first."""

OTHERS = ("rollbacks.json", "damaged.json", "metrics.cut.jsonl", "metrics.jsonl.tmp", "config.yaml.tmp", "table.txt")


def put(run: Path, name: str, kind: str) -> Path:
    """Puts what is no file into a run's folder. Returns a file beside it that nobody may write to."""
    path, secret = run / name, run.with_name("secret")
    secret.write_bytes(SECRET)
    path.parent.mkdir(exist_ok=True)
    path.unlink(missing_ok=True)
    if kind == "pipe":
        os.mkfifo(path)
    else:
        path.symlink_to(secret if kind == "link" else "/dev/zero")
    return secret


def go_on(config: RunConfig) -> str:
    try:
        train_here(config)
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return ""


def goes_on_or_names_it(tiny: Path, run: Path, name: str, kind: str) -> None:
    secret = put(run, name, kind)
    [said] = run_ranks(1, go_on, a_run(tiny, run, train={"epochs": 3}), timeout=240)
    assert not said or str(run / name) in said, (name, kind, said)
    assert secret.read_bytes() == SECRET, (name, kind)


@pytest.mark.parametrize("kind", ["pipe", "link"])
def test_the_files_that_are_looked_at_first(tiny: Path, whole: Path, tmp_path: Path, kind: str) -> None:
    for index, name in enumerate(NAMES):
        goes_on_or_names_it(tiny, Path(shutil.copytree(whole, tmp_path / str(index))), name, kind)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["pipe", "link", "device"])
def test_every_file(tiny: Path, whole: Path, tmp_path: Path, kind: str) -> None:
    names = {str(path.relative_to(whole)) for path in whole.rglob("*") if path.is_file()}
    for index, name in enumerate(sorted(names | {*NAMES, *OTHERS})):
        goes_on_or_names_it(tiny, Path(shutil.copytree(whole, tmp_path / str(index))), name, kind)


@pytest.mark.slow
@pytest.mark.parametrize("command", ["export", "evaluate", "report --out OUT", "checkpoint ls"])
def test_every_file_that_a_command_looks_at(whole: Path, tmp_path: Path, command: str) -> None:
    for index, name in enumerate(("config.yaml", "metrics.jsonl", "classes.json", "export/x.json.tmp")):
        run = Path(shutil.copytree(whole, tmp_path / str(index)))
        secret = put(run, name, "pipe" if index % 2 else "link")
        program, *options = command.replace("OUT", str(tmp_path / "out")).split()
        words = [sys.executable, "-m", f"launch.{program}", *options, str(run)]
        done = subprocess.run(words, capture_output=True, text=True, timeout=240, cwd=Path(__file__).parents[3])
        assert "Traceback" not in done.stderr
        assert done.returncode == 0 or str(run / name) in done.stderr, (name, done.stderr)
        assert secret.read_bytes() == SECRET

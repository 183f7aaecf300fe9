"""The commands of docs/sweeps_and_reports.md and docs/reproducing.md, each as it stands there, but that nothing is
trained: sweeps say how far they are, which reads the file, the patterns and the overrides."""

from __future__ import annotations

import contextlib
import json
import os
import re
import shlex
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml

from engine.config.grid import cells_of, read_grid
from engine.config.loading import dump_anywhere, load
from launch.parsing import parser
from launch.sweeping.cells import write_down
from tests.launch.command import run_command

ROOT = Path(__file__).parents[2]
PAGES = ("sweeps_and_reports", "reproducing")
COMMANDS = [
    command
    for page in PAGES
    for command in re.findall(r"python launch/[^`\n]+", (ROOT / "docs" / f"{page}.md").read_text("utf-8"))
    if "$WANDB_RUN_ID" not in command
]


@contextlib.contextmanager
def standing_in(folder: Path) -> Iterator[None]:
    before = Path.cwd()
    os.chdir(folder)
    try:
        yield
    finally:
        os.chdir(before)


def evaluated(folder: Path, config: Path) -> None:
    """A run that has come to its end, by its files."""
    folder.mkdir(parents=True, exist_ok=True)
    run = load(config)
    (folder / "config.yaml").write_text(dump_anywhere(run))
    names = [name for name, _ in run.trained]
    scores = {f"val/{name}/{part}": 50.0 for name in (*names, "ensemble") for part in ("top1", "top5", "loss")}
    line = {"step": 1, "epoch": float(run.train.epochs or 0), **scores, "val/disagreement": 1.0}
    (folder / "metrics.jsonl").write_text(json.dumps(line) + "\n")


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where the commands are typed: the project, and the runs that they speak of."""
    folder = tmp_path_factory.mktemp("place")
    (folder / "configs").symlink_to(ROOT / "configs")
    with standing_in(folder):
        for name in ("independent", "dml"):
            evaluated(folder / f"runs/quickstart-{name}", ROOT / f"configs/fashion_mnist/quickstart_{name}.yaml")
        for table in ("quickstart", "lmcl_cifar100"):
            path = Path(f"configs/tables/{table}.yaml")
            grid = read_grid(path, [0])
            grid = grid.model_copy(update={"networks": dict([next(iter(grid.networks.items()))])})
            cells = cells_of(grid, path)
            write_down(grid, cells)
            evaluated(cells[0].config.folder, grid.folder / "cells" / f"{cells[0].name}.yaml")
    return folder


@pytest.mark.parametrize("command", COMMANDS)
def test_a_command_of_the_documentation(command: str, place: Path) -> None:
    _, script, *words = shlex.split(command)
    with standing_in(place):
        if script == "launch/sweep.py":
            words = [word for word in words if word != "--check"]
            found = run_command("sweep", words[0], "--show", "seeds=0", *words[1:])[1]
            assert found.splitlines()[0].startswith("run ")
        else:
            assert script == "launch/report.py"
            assert "page: " in run_command("report", *words)[1]


def test_the_sweep_file_of_the_documentation(tmp_path: Path) -> None:
    page = (ROOT / "docs/sweeps_and_reports.md").read_text("utf-8")
    shutil.copytree(ROOT / "configs/fashion_mnist", tmp_path / "fashion_mnist")
    path = tmp_path / "tables" / "x.yaml"
    path.parent.mkdir()
    path.write_text(re.findall(r"```yaml\n(.*?)```", page, re.DOTALL)[0])
    assert len(cells_of(read_grid(path), path)) == (5 * 2 - 2) * 2 * 5


def test_wandbs_agent_gives_values_as_the_training_command_takes_them() -> None:
    page = (ROOT / "docs/sweeps_and_reports.md").read_text("utf-8")
    sweep = yaml.safe_load(re.findall(r"```yaml\n(.*?)```", page, re.DOTALL)[1])
    _, _, script, *_ = sweep["command"]
    words = shlex.split(script.removeprefix("exec python launch/train.py ").replace("$WANDB_RUN_ID", "abc"))
    given = [f"--{key}={1.0}" for key in sweep["parameters"]]
    arguments = parser("", "")
    arguments.add_words("CONFIG", "")
    before = sys.argv
    try:
        sys.argv = ["launch/train.py", *words[:-1], *given]
        _, chosen, overrides = arguments.parse_words()
    finally:
        sys.argv = before
    config = load(ROOT / str(chosen), overrides)
    assert (config.name, config.optimizer.lr, config.method.model_dump()["temperature"]) == ("tune-abc", 1.0, 1.0)

"""A run is used from its folder, wherever that lies, wherever one stands, and without the files it was started from."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import models
from engine.config import ConfigError
from engine.config.loading import load, load_run
from engine.reporting.tracking import read_metrics
from tests.marks import slow
from tests.runs import small_run, train_here, weights
from tests.worlds import run_ranks

ROOT = Path(__file__).parents[2]


@pytest.fixture
def moved(tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """One epoch of a run that was started by relative paths from a file of weights; it is elsewhere now, and the file
    of weights and the place where one stood are gone."""
    there = tmp_path / "there"
    there.mkdir()
    monkeypatch.chdir(there)
    torch.save(models.create("cifar_resnet8_b", 10, 1, width=4).state_dict(), "start.pt")
    Path("data").symlink_to(tiny)
    peers = [
        {"network": "cifar_resnet8_b", "options": {"width": 4}, "name": name, "pretrained": pretrained}
        for name, pretrained in (("a", "start.pt"), ("b", False))
    ]
    config = small_run(Path("data"), Path("run"), {"name": "dml"}, peers, train={"epochs": 1})
    run_ranks(1, train_here, config)
    Path("start.pt").unlink()
    (tmp_path / "else").mkdir()
    shutil.move("run", tmp_path / "else" / "renamed")
    monkeypatch.chdir("/")
    return tmp_path / "else" / "renamed"


def command(name: str, *arguments: str | Path) -> str:
    done = subprocess.run(
        [sys.executable, str(ROOT / "launch" / f"{name}.py"), *map(str, arguments)],
        capture_output=True,
        text=True,
        check=False,
        cwd="/",
    )
    assert done.returncode == 0, done.stderr
    return done.stdout + done.stderr


@pytest.mark.parametrize("by", [slow(""), "config.yaml"])
def test_a_moved_run_goes_on_where_it_is(moved: Path, tmp_path: Path, by: str) -> None:
    before = weights(moved)
    said = command("train", moved / by, "train.epochs=2")
    assert "going on at step 5 of 10" in said
    assert not (tmp_path / "there" / "run").exists()
    assert read_metrics(moved)[-1]["step"] == 10
    assert any(not torch.equal(x, before[name]) for name, x in weights(moved, 10).items())


def test_a_moved_run_is_scored_exported_and_reported(moved: Path) -> None:
    assert "step 5" in command("evaluate", moved)
    assert "compared, equal" in command("export", moved)
    assert "dml" in command("report", moved, "--out", moved / "side_by_side")


def test_overrides_still_say_where_a_run_shall_be(moved: Path, tmp_path: Path) -> None:
    config = load(moved / "config.yaml", [f"dir={tmp_path / 'other'}"])
    assert config.folder == tmp_path / "other"
    assert load(moved, []).folder == load_run(moved).folder == moved


def test_a_file_of_weights_that_is_missing_is_named_before_a_run_is_started(tiny: Path, tmp_path: Path) -> None:
    peers = [{"network": "cifar_resnet8_b", "options": {"width": 4}, "pretrained": str(tmp_path / "none.pt")}]
    config = small_run(tiny, tmp_path / "run", {"name": "independent"}, peers)
    with pytest.raises(ConfigError, match=r"^peers\.0: network 'cifar_resnet8_b': pretrained '.*': there is no such"):
        train_here(config)

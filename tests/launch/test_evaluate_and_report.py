"""Scoring finished runs, and putting them side by side."""

from __future__ import annotations

import json
import shutil
import struct
from pathlib import Path

import pytest

from engine.reporting.tracking import read_metrics
from tests.launch.command import run_command
from tests.runs import small_run, train_here
from tests.worlds import run_ranks


@pytest.fixture(scope="module")
def run(tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("scored")
    run_ranks(1, train_here, small_run(tiny, folder, train={"epochs": 2, "ema_decay": 0.5}, name="one"))
    return folder


def _evaluate(run: Path, out: Path) -> None:
    run_command("evaluate", str(run), "--json", str(out))


@pytest.mark.parametrize("ranks", [1, 2, 4])
def test_scores_are_those_of_the_training_run_on_any_number_of_ranks(run: Path, tmp_path: Path, ranks: int) -> None:
    run_ranks(ranks, _evaluate, run, tmp_path / "scores.json")
    scores = json.loads((tmp_path / "scores.json").read_text())
    expected = read_metrics(run)[-1]
    assert (scores.pop("step"), scores.pop("images")) == (10, 37)
    assert {key for key in expected if key[:4] in ("val/", "ema/")} == scores.keys()
    assert scores == {key: pytest.approx(expected[key], rel=1e-5) for key in scores}


def test_report_has_every_peer_of_every_run_and_a_picture(run: Path, tmp_path: Path) -> None:
    _, out, _ = run_command("report", str(run), str(run), "--out", str(tmp_path / "both"))
    last = read_metrics(run)[-1]
    for name in ("cifar_resnet8_b-0", "cifar_resnet8_b-1", "ensemble"):
        row = next(line for line in out.splitlines() if f" {name} " in line)
        assert f"{last[f'val/{name}/top1']:.2f}" in row
        assert any(f"{name} (average)" in line for line in out.splitlines())
    mean = sum(last[f"val/cifar_resnet8_b-{k}/top1"] for k in range(2)) / 2
    assert f"one: deployed: the mean of the peers, top-1 {mean:.2f} %" in out.splitlines()
    assert out.startswith((tmp_path / "both.txt").read_text().rstrip())
    header = (tmp_path / "both.png").read_bytes()[:24]
    assert header[:8] == b"\x89PNG\r\n\x1a\n"
    assert struct.unpack(">II", header[16:]) == (2160, 540)


def test_runs_of_one_name_are_told_apart_by_where_they_lie(run: Path, tmp_path: Path) -> None:
    for seed in ("seed0", "seed1"):
        shutil.copytree(run, tmp_path / "sweep" / seed / "run")
    folders = [tmp_path / "sweep" / seed / "run" for seed in ("seed0", "seed1")]
    out = run_command("report", *map(str, folders), "--out", str(tmp_path / "both"))[1]
    for seed in ("seed0", "seed1"):
        assert sum(line.startswith(f"one ({seed}/run) ") for line in out.splitlines()) == 6
        assert f"one ({seed}/run): deployed: " in out


def test_report_of_a_folder_without_a_run_says_so(tmp_path: Path) -> None:
    code, _, err = run_command("report", str(tmp_path), "--out", str(tmp_path / "x"), check=False)
    assert code == 2
    assert err == f"error: {tmp_path}: holds no evaluated run; expected a folder with config.yaml and metrics.jsonl\n"

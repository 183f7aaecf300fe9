"""Scoring finished runs, and putting them side by side."""

from __future__ import annotations

import csv
import json
import shutil
import struct
from collections import Counter
from pathlib import Path

import pytest

from engine.reporting.tracking import read_metrics
from tests.launch.command import run_command
from tests.runs import small_run, train_here
from tests.worlds import run_ranks

PEERS = ("cifar_resnet8_b-0", "cifar_resnet8_b-1")


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


def _rows(path: Path) -> list[dict[str, str]]:
    return list(csv.DictReader(path.read_text().splitlines()))


def _predict(run: Path, out: Path) -> None:
    files = [f"--{name}={out / name}.csv" for name in ("predictions", "per-class", "confusion")]
    run_command(
        "evaluate", str(run), *files, "evaluation.topk=[3]", "evaluation.batch=4", "--json", str(out / "s.json")
    )


@pytest.mark.parametrize("ranks", [1, 3])
def test_what_was_named_for_each_image_is_what_was_counted(run: Path, tmp_path: Path, ranks: int) -> None:
    run_ranks(ranks, _predict, run, tmp_path)
    scores = json.loads((tmp_path / "s.json").read_text())
    lines, classes, taken = (_rows(tmp_path / f"{name}.csv") for name in ("predictions", "per-class", "confusion"))
    assert [line["id"] for line in lines] == [str(index) for index in range(37)]
    assert sum(int(line["images"]) for line in classes) == 37
    networks = [f"{kind}/{name}" for kind in ("val", "ema") for name in (*PEERS, "ensemble")]
    assert {line["network"] for line in taken} == set(networks)
    for network in networks:
        right = [line["label"] == line[f"{network}/predicted"] for line in lines]
        assert 100 * sum(right) / 37 == pytest.approx(scores[f"{network}/top1"])
        for line in classes:
            of_class = [hit for hit, each in zip(right, lines, strict=True) if each["label"] == line["class"]]
            assert float(line[f"{network}/top1"]) == pytest.approx(100 * sum(of_class) / len(of_class))
        pairs = Counter((line["label"], line[f"{network}/predicted"]) for line in lines)
        mine = [line for line in taken if line["network"] == network]
        assert {(line["class"], line["predicted"]): int(line["images"]) for line in mine} == pairs
        assert all(0.1 < float(line[f"{network}/probability"]) <= 1 for line in lines)
        assert scores[f"{network}/top1"] <= scores[f"{network}/top3"] <= scores[f"{network}/top5"]


def test_a_run_leaves_its_tables(tiny: Path, tmp_path: Path) -> None:
    asked = {"per_class": True, "confusion": True, "topk": [3]}
    run_ranks(2, train_here, small_run(tiny, tmp_path, train={"epochs": 1}, evaluation=asked))
    last = read_metrics(tmp_path)[-1]
    classes, taken = (_rows(tmp_path / f"{name}.csv") for name in ("per_class", "confusion"))
    for name in (*PEERS, "ensemble"):
        right = [float(line[f"val/{name}/top1"]) * int(line["images"]) / 37 for line in classes]
        assert sum(right) == pytest.approx(last[f"val/{name}/top1"])
        mine = [line for line in taken if line["network"] == f"val/{name}" and line["class"] == line["predicted"]]
        assert 100 * sum(int(line["images"]) for line in mine) / 37 == pytest.approx(last[f"val/{name}/top1"])


@pytest.mark.parametrize(("name", "expected"), [("a.txt", "ends in .csv or .jsonl"), ("no/a.csv", "is not a folder")])
def test_where_predictions_cannot_go_is_told_before_anything_is_scored(
    run: Path, tmp_path: Path, name: str, expected: str
) -> None:
    code, out, err = run_command("evaluate", str(run), "--predictions", str(tmp_path / name), check=False)
    assert (code, out) == (2, "")
    assert err.startswith(f"error: --predictions {tmp_path / name}: ")
    assert expected in err


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
    assert {path.suffix for path in tmp_path.glob("both.*")} == {".txt", ".png", ".html", ".md", ".csv"}


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

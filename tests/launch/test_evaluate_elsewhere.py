"""A run is scored on other data than its own: classes by name, a validation split alone, any number of images."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from engine.config.loading import validate
from tests.launch.command import run_command
from tests.runs import train_here
from tests.worlds import run_ranks

CLASSES = [f"n{k:02d}" for k in range(12)]


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two peers, one epoch on 12 colours."""
    pytest.importorskip("nvidia.dali")
    root = tmp_path_factory.mktemp("colours")
    rng = np.random.default_rng(0)
    for k, name in enumerate(CLASSES):
        colour = 20 + 215 * np.array([k % 3 / 2, k // 3 % 2, k // 6])
        for split, count in (("train", 6), ("val", 3)):
            (root / "data" / split / name).mkdir(parents=True)
            for i in range(count):
                pixels = np.clip(colour + rng.integers(-15, 15, (40, 40, 3)), 0, 255).astype(np.uint8)
                Image.fromarray(pixels).save(root / "data" / split / name / f"{i}.JPEG")
    raw: dict[str, Any] = {
        "name": "colours",
        "dir": str(root / "run"),
        "method": {"name": "dml"},
        "peers": [{"network": "timm/test_resnet", "copies": 2}],
        "data": {"dataset": "image_folder", "root": str(root / "data"), "global_batch": 24},
        "train": {"epochs": 2, "ema_decay": 0.5},
        "log": {"progress": False},
    }
    raw["data"] |= {"image": {"size": 32, "resize": 36}, "decoding": {"threads": 1}}
    run_ranks(1, train_here, validate(raw))
    return root / "run"


def scores(run: Path, out: Path, *overrides: str) -> dict[str, float]:
    run_command("evaluate", str(run), "--json", str(out), *overrides)
    found: dict[str, float] = json.loads(out.read_text())
    return found


def test_the_same_images_under_other_folders_score_the_same(run: Path, tmp_path: Path) -> None:
    val = run.parent / "data" / "val"
    shutil.copytree(val, tmp_path / "named" / "val")
    for k, name in enumerate(CLASSES):
        shutil.copytree(val / name, tmp_path / "places" / str(k))
    expected = scores(run, tmp_path / "own.json")
    assert expected["images"] == 36
    for other in ("named", "places"):
        # As many as there are of images would not do for a batch of training.
        found = scores(run, tmp_path / "other.json", f"data.root={tmp_path / other}", "data.global_batch=1000")
        assert found == {key: pytest.approx(value, abs=1e-4) for key, value in expected.items()}


def test_an_image_is_named_by_its_file_and_one_that_cannot_be_read_is_named_nothing(run: Path, tmp_path: Path) -> None:
    shutil.copytree(run.parent / "data" / "val", tmp_path / "val")
    (tmp_path / "val" / "n03" / "1.JPEG").write_bytes(b"no image")
    out = tmp_path / "out.jsonl"
    run_command("evaluate", str(run), "--predictions", str(out), f"data.root={tmp_path}")
    lines = [json.loads(line) for line in out.read_text().splitlines()]
    assert [line["path"] for line in lines] == [
        str(tmp_path / "val" / name / f"{i}.JPEG") for name in CLASSES for i in range(3)
    ]
    labels: list[str | None] = [name for name in CLASSES for _ in range(3)]
    assert [line["label"] for line in lines] == [*labels[:10], None, *labels[11:]]
    assert {value for key, value in lines[10].items() if key not in ("id", "path")} == {None}


def test_some_of_the_classes_will_do_and_are_said(run: Path, tmp_path: Path) -> None:
    for name in CLASSES[7:]:
        shutil.copytree(run.parent / "data" / "val" / name, tmp_path / "few" / name)
    _, out, _ = run_command("evaluate", str(run), f"data.root={tmp_path / 'few'}")
    assert "5 of the network's 12 classes" in out
    assert ", 15 images, " in out
    assert "disagreement: % of images" in out


def test_classes_of_another_kind_are_refused_by_name(run: Path, tmp_path: Path) -> None:
    shutil.copytree(run.parent / "data" / "val" / "n03", tmp_path / "cats" / "n033")
    code, out, err = run_command("evaluate", str(run), f"data.root={tmp_path / 'cats'}", check=False)
    assert (code, out) == (2, "")
    assert err.startswith(f"error: data.root: {tmp_path / 'cats'}: class 'n033': expected classes that the network was")
    assert err.endswith("; did you mean 'n03'?\n")

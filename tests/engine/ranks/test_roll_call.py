"""Ranks that differ in what they run with are refused before the first step. Real ranks."""

from __future__ import annotations

import re
import shutil
import socket
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from engine.config import RunConfig
from engine.config.loading import dump, load, validate
from engine.ranks import roll_call
from engine.ranks.collectives import Launch
from tests.data_pipelines.files import write_fashion, write_idx, write_photos
from tests.runs import small_run, train_here
from tests.worlds import run_ranks

HOST = socket.gethostname()


def refused(config: RunConfig, *arguments: Any, world: int = 2, say: Any = None) -> str:
    """What a world says whose last rank trains with some keys of its own."""
    with pytest.raises(RuntimeError) as error:
        run_ranks(world, say or train_with, config, *arguments)
    said = re.findall(r"ConfigError: (.*)", str(error.value))
    assert said, error.value
    assert not (config.folder / "metrics.jsonl").exists()
    assert not (config.folder / "checkpoints").exists()
    return str(said[0])


def train_with(config: RunConfig, *overrides: str) -> None:
    launch = Launch.from_environment()
    if launch.rank == launch.world - 1:
        path = config.folder.parent / "other.yaml"
        path.write_text(dump(config))
        config = load(path, overrides)
    train_here(config)


@pytest.mark.parametrize(
    ("key", "here", "there"),
    [
        ("optimizer.lr", "0.01", "0.05"),
        ("train.clip_norm", "2.0", "None"),
        ("method.temperature", "2.0", "1.0"),
        ("precision.amp", "'bf16'", "'float32'"),
        ("train.epochs", "3", "2"),
        ("seed", "1", "0"),
    ],
)
def test_another_value_of_a_key(tiny: Path, tmp_path: Path, key: str, here: str, there: str) -> None:
    said = refused(small_run(tiny, tmp_path / "run"), f"{key}={here}")
    expected = f"{key}: rank 1 on {HOST} has {here}, rank 0 on {HOST} has {there}; expected the same on all ranks"
    assert said.startswith(expected)


def test_a_network_of_another_width_on_one_of_three_ranks(tiny: Path, tmp_path: Path) -> None:
    """Where most are alike, the odd one is named."""
    config = small_run(tiny, tmp_path / "run", peers=3)
    said = refused(config, "peers=[{network: cifar_resnet8_b, copies: 3, options: {width: 8}}]", world=3)
    assert said.startswith(f"peers.0.options.width: rank 2 on {HOST} has 8, rank 0 on {HOST} has 4; expected the same")


def test_keys_that_machines_may_have_of_their_own(tiny: Path, tmp_path: Path) -> None:
    shutil.copytree(tiny, tmp_path / "data")
    keys = (f"data.root={tmp_path / 'data'}", f"dir={tmp_path}/../{tmp_path.name}/run", "log.progress=true")
    run_ranks(2, train_with, small_run(tiny, tmp_path / "run", train={"epochs": 1}), *keys)


def test_one_label_that_differs(tmp_path: Path) -> None:
    arrays = write_fashion(tmp_path / "one")
    write_fashion(tmp_path / "two")
    labels = arrays["train-labels-idx1-ubyte"].copy()
    labels[7] = (labels[7] + 1) % 10
    write_idx(tmp_path / "two" / "train-labels-idx1-ubyte.gz", labels.astype(np.uint8))
    said = refused(small_run(tmp_path / "one", tmp_path / "run"), f"data.root={tmp_path / 'two'}")
    pattern = r"data: train labels: rank 1 on \S+ has '24 labels \(\w{16}\)', rank 0 on \S+ has '24 labels \(\w{16}\)'"
    assert re.match(pattern, said), said


def one_more(root: Path) -> None:
    shutil.copy(root / "train/n000/00.JPEG", root / "train/n000/99.JPEG")


def another_class(root: Path) -> None:
    for split in ("train", "val"):
        (root / split / "n001").rename(root / split / "n009")


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        (one_more, r"data: train samples: rank 1 on \S+ has '28 samples .*', rank 0 on \S+ has '27 samples "),
        (
            another_class,
            r"data: classes: rank 1 on \S+ has '3 classes \(n000, n002, n009; .*', rank 0 .*\(n000, n001",
        ),
        (shutil.rmtree, r"data.root: .*/two is not a folder"),
    ],
)
def test_folders_that_differ(tmp_path: Path, change: Any, expected: str) -> None:
    write_photos(tmp_path / "one")
    shutil.copytree(tmp_path / "one", tmp_path / "two")
    change(tmp_path / "two")
    data = {"dataset": "image_folder", "root": str(tmp_path / "one"), "global_batch": 4, "image": {"size": 32}}
    raw = small_run(tmp_path, tmp_path / "run").model_dump(mode="json") | {"data": data}
    said = refused(validate(raw), f"data.root={tmp_path / 'two'}")
    assert re.match(expected, said), said


def other_program(config: RunConfig, what: str) -> None:
    if Launch.from_environment().rank == 1:
        if what == "code":
            roll_call.code = lambda: "another"
        else:
            versions = roll_call.versions()
            roll_call.versions = lambda: {**versions, what: "1.2.3"}
    train_here(config)


@pytest.mark.parametrize("what", ["code", "torch", "timm"])
def test_another_version_of_the_program_or_of_a_package(tiny: Path, tmp_path: Path, what: str) -> None:
    said = refused(small_run(tiny, tmp_path / "run"), what, say=other_program)
    other = "another" if what == "code" else "1.2.3"
    assert said.startswith(f"{what}: rank 1 on {HOST} has '{other}', rank 0 on {HOST} has '")

"""Runs over folders with files that cannot be read, on real ranks."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from engine.config import RunConfig
from engine.ranks.collectives import Launch
from engine.reporting import tracking
from engine.trainer import train
from tests.data_pipelines.files import write_photos
from tests.data_pipelines.test_bad_files import _half, _undecodable
from tests.kills import assert_same_state, final_state, kill_after_step, numbers
from tests.runs import assert_same_weights, small_run, weights
from tests.worlds import run_ranks


def _train(roots: list[str], raw: dict[str, Any]) -> None:
    """On this rank, with the folder of photos that is its own."""
    launch = Launch.from_environment()
    data = raw["data"] | {"root": roots[launch.rank % len(roots)]}
    train(RunConfig.model_validate(raw | {"data": data}), launch)


def _run(root: Path, folder: Path, **sections: Any) -> RunConfig:
    raw: dict[str, Any] = {
        "peers": [{"network": "timm/test_resnet", "copies": 2}],
        "log": {"progress": False, "every_steps": 1},
        **sections,
    }
    plain = small_run(root, folder, **raw).model_dump(mode="json")
    data = {
        "dataset": "image_folder",
        "root": str(root),
        "global_batch": 8,
        "image": {"size": 48, "resize": 56},
        "decoding": {"threads": 1, "decoder": "torchvision"},
        "max_bad": 0.2,
    }
    return RunConfig.model_validate(plain | {"data": data})


def _here(config: RunConfig) -> None:
    train(config, Launch.from_environment())


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("photos")
    write_photos(root)
    for name, spoil in (("train/n000/00", _half), ("train/n002/08", _undecodable), ("val/n001/02", _half)):
        spoil(root / f"{name}.JPEG")
    return root


def test_ranks_do_not_change_the_numbers_and_all_is_told(photos: Path, tmp_path: Path) -> None:
    kinds = {"alone": (1, "colocated"), "spread": (2, "spread"), "replicas": (2, "colocated"), "both": (4, "spread")}
    told = {}
    for name, (ranks, kind) in kinds.items():
        folder = tmp_path / name
        run_ranks(ranks, _here, _run(photos, folder, placement={"kind": kind}))
        told[name] = json.loads((folder / "damaged.json").read_text())
        scores = tracking.read_metrics(folder)[-1]
        assert scores["val/unreadable"] == 1
        # One of fifteen is wrong for every peer.
        assert scores["val/ensemble/top1"] <= 100 * 14 / 15 + 1e-9
    assert_same_weights(weights(tmp_path / "spread"), weights(tmp_path / "alone"))
    assert_same_weights(weights(tmp_path / "both"), weights(tmp_path / "replicas"))
    assert [Path(entry["path"]).relative_to(photos).as_posix() for entry in told["alone"]] == [
        "train/n000/00.JPEG",
        "train/n002/08.JPEG",
        "val/n001/02.JPEG",
    ]
    assert told["alone"] == told["spread"] == told["both"] == told["replicas"]
    assert "cut short" in told["alone"][0]["reason"]
    assert "cannot be decoded" in told["alone"][1]["reason"]
    assert told["alone"][2]["times"] == 2  # of as many evaluations


@pytest.mark.slow
def test_uneven_ranks_that_decode_for_each_other_count_held_out_photos_once(photos: Path, tmp_path: Path) -> None:
    """Two surveys of 13 held-out photos, and two epochs of the rest: each damaged one is met by turns in either."""
    told = []
    for name, (ranks, kind) in {"alone": (1, "colocated"), "uneven": (3, "balanced")}.items():
        config = _run(photos, tmp_path / name, placement={"kind": kind})
        raw = config.model_dump(mode="json") | {"method": {"name": "kdcl", "ensemble": "general"}}
        raw["data"] |= {"held_out": 0.5}
        raw["train"] |= {"epochs": 3}
        run_ranks(ranks, _here, RunConfig.model_validate(raw))
        told.append(json.loads((tmp_path / name / "damaged.json").read_text()))
    assert told[0] == told[1]
    assert {entry["split"] for entry in told[0]} == {"train", "val"}


def test_a_killed_run_ends_with_the_same_bits(photos: Path, tmp_path: Path) -> None:
    sections: dict[str, Any] = {"checkpoint": {"every_steps": 2}, "train": {"epochs": 3}}
    run_ranks(2, _here, _run(photos, tmp_path / "undisturbed", **sections))
    killed = _run(photos, tmp_path / "killed", **sections)
    kill_after_step(2, killed, 4)
    run_ranks(2, _here, killed)
    assert_same_state(final_state(tmp_path / "killed"), final_state(tmp_path / "undisturbed"))
    assert numbers(tmp_path / "killed") == numbers(tmp_path / "undisturbed")


def test_more_than_max_bad_ends_all_ranks_by_name(photos: Path, tmp_path: Path) -> None:
    config = _run(photos, tmp_path / "run")
    raw = config.model_dump(mode="json")
    raw["data"]["max_bad"] = 0.05
    with pytest.raises(RuntimeError, match=r"max_bad: 2 of 27 train files cannot be read, more than max_bad = 0.05"):
        run_ranks(2, _train, [str(photos)], raw)

"""The promises with DALI under them: a folder of JPEGs, real decoding, real ranks."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from engine.config import RunConfig
from engine.reporting import tracking
from tests.data_pipelines.files import write_photos
from tests.kills import assert_same_state, final_state, kill_after_step, numbers
from tests.runs import assert_same_weights, small_run, train_here, weights
from tests.worlds import run_ranks


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("photos")
    write_photos(root)
    return root


def _run(photos: Path, folder: Path, **sections: Any) -> RunConfig:
    """27 training photos in global batches of 8: 3 steps an epoch, 2 epochs."""
    raw: dict[str, Any] = {
        "peers": [{"network": "timm/test_resnet", "copies": 2}],
        "data": {
            "dataset": "image_folder",
            "root": str(photos),
            "global_batch": 8,
            "image": {"size": 48, "resize": 56},
            "decoding": {"threads": 2},
        },
        "log": {"progress": False, "every_steps": 1},
        **sections,
    }
    # small_run's data section is of another data set.
    plain = small_run(photos, folder, **{name: x for name, x in raw.items() if name != "data"}).model_dump(mode="json")
    return RunConfig.model_validate(plain | {"data": raw["data"]})


def test_every_placement_gives_the_same_weights_and_scores(photos: Path, tmp_path: Path) -> None:
    folders = {ranks: tmp_path / str(ranks) for ranks in (1, 2)}
    for ranks, folder in folders.items():
        run_ranks(ranks, train_here, _run(photos, folder))
    assert_same_weights(weights(folders[2]), weights(folders[1]))
    alone, spread = (tracking.read_metrics(folder)[-1] for folder in folders.values())
    assert {name: x for name, x in spread.items() if name.endswith("top1")} == {
        name: x for name, x in alone.items() if name.endswith("top1")
    }


def test_replicas_see_the_same_photos_in_every_placement(photos: Path, tmp_path: Path) -> None:
    run_ranks(4, train_here, _run(photos, tmp_path / "spread"))
    run_ranks(2, train_here, _run(photos, tmp_path / "colocated", placement={"kind": "colocated"}))
    assert_same_weights(weights(tmp_path / "spread"), weights(tmp_path / "colocated"))


def test_killed_run_ends_with_the_same_bits(photos: Path, tmp_path: Path) -> None:
    sections: dict[str, Any] = {"checkpoint": {"every_steps": 2}, "train": {"epochs": 3}}
    run_ranks(2, train_here, _run(photos, tmp_path / "undisturbed", **sections))
    killed = _run(photos, tmp_path / "killed", **sections)
    kill_after_step(2, killed, 4)
    run_ranks(2, train_here, killed)
    assert_same_state(final_state(tmp_path / "killed"), final_state(tmp_path / "undisturbed"))
    assert numbers(tmp_path / "killed") == numbers(tmp_path / "undisturbed")

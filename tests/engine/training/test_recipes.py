"""Today's recipes under the promises: placement, resume and micro-batches, with everything mixed and smoothed."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from engine.config import ConfigError
from engine.config.loading import dump, load, validate
from engine.preflight import check_run
from engine.ranks.collectives import Launch
from engine.ranks.planning.choosing import plan
from engine.rehearsal import Images, rehearse
from tests.data_pipelines.augmentation.recipe import RECIPE
from tests.runs import assert_same_weights, small_run, train_here, weights
from tests.worlds import run_ranks

_LOSS = {"epochs": 2, "loss": "binary_cross_entropy", "bce_threshold": 0.2}


def _run(tiny: Path, folder: Path, **sections: Any) -> Any:
    data = {"augmentation": RECIPE} | sections.pop("data", {})
    return small_run(tiny, folder, sections.pop("method", None), data=data, **sections)


def test_ranks_and_placements_do_not_change_the_numbers(tiny: Path, tmp_path: Path) -> None:
    data = {"views": "per_peer"}
    kinds = {
        "colocated": (1, "colocated"),
        "spread": (2, "spread"),
        "both": (4, "spread"),
        "replicas": (2, "colocated"),
    }
    for name, (ranks, kind) in kinds.items():
        run_ranks(ranks, train_here, _run(tiny, tmp_path / name, data=data, train=_LOSS, placement={"kind": kind}))
    assert_same_weights(weights(tmp_path / "spread"), weights(tmp_path / "colocated"))
    assert_same_weights(weights(tmp_path / "both"), weights(tmp_path / "replicas"))


def test_weights_of_classes_and_a_part_of_the_data_on_any_placement(tiny: Path, tmp_path: Path) -> None:
    """With hard labels, which the mean over rows does not divide by."""
    data = {"class_weights": [1.0, 9.0] * 5, "fraction": 0.8}
    for name, ranks in (("colocated", 1), ("spread", 2)):
        run_ranks(ranks, train_here, small_run(tiny, tmp_path / name, data=data, placement={"kind": name}))
    assert_same_weights(weights(tmp_path / "spread"), weights(tmp_path / "colocated"))
    run_ranks(1, train_here, small_run(tiny, tmp_path / "alike", data={"fraction": 0.8}))
    with pytest.raises(AssertionError):
        assert_same_weights(weights(tmp_path / "alike"), weights(tmp_path / "colocated"))


def test_a_resumed_run_ends_with_the_same_bits(tiny: Path, tmp_path: Path) -> None:
    run_ranks(1, train_here, _run(tiny, tmp_path / "cut", train={"epochs": 1}, schedule={"name": "constant"}))
    run_ranks(1, train_here, _run(tiny, tmp_path / "cut", schedule={"name": "constant"}))
    run_ranks(1, train_here, _run(tiny, tmp_path / "whole", schedule={"name": "constant"}))
    assert_same_weights(weights(tmp_path / "cut"), weights(tmp_path / "whole"), 0)


@pytest.mark.parametrize("method", [{"name": "independent"}, {"name": "kdcl", "ensemble": "linear"}])
def test_a_step_can_be_rehearsed_and_waits_for_nothing(tiny: Path, tmp_path: Path, method: dict[str, Any]) -> None:
    config = _run(tiny, tmp_path, method=method, train=_LOSS)
    assert rehearse(config, plan(config, 2, 0), Images(10, 1, 28, 120)).waits == ()


def test_pairs_stay_within_a_rank_and_a_micro_batch(tiny: Path, tmp_path: Path) -> None:
    config = _run(tiny, tmp_path, train={"epochs": 2, "accumulation": 2}, placement={"kind": "colocated"})
    shares = [share for rank in range(4) for share in plan(config, 4, rank).cut(24, 2, 2)]
    assert {len(share.rows) for share in shares} == {2, 4}  # 6 pairs of a micro-batch on 4 ranks
    assert all(share.rows.start % 2 == 0 for share in shares)
    message = r"data.global_batch = 24: 7 replicas x 2 micro-batches do not get a whole tuple of 2 images that are"
    with pytest.raises(ConfigError, match=message):
        plan(config, 7, 0)


@pytest.mark.parametrize("method", [{"name": "mcl"}, {"name": "lmcl"}, {"name": "kdcl", "ensemble": "minlogit"}])
@pytest.mark.parametrize("key", ["mixing", "label_smoothing"])
def test_methods_that_need_classes_are_refused_by_name(
    tiny: Path, tmp_path: Path, method: dict[str, Any], key: str
) -> None:
    augmentation = {"mixing": {"mixup_alpha": 0.2}} if key == "mixing" else {"label_smoothing": 0.1}
    shown = method["name"] + (" with ensemble = minlogit" if "ensemble" in method else "")
    with pytest.raises(
        ConfigError, match=f"data.augmentation.{key}: {shown} has to know of which one class an image is"
    ):
        _run(tiny, tmp_path, method=method, data={"augmentation": augmentation})


def test_options_of_another_loss(tiny: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"train.bce_threshold = 0.2: has no meaning for train.loss = cross_entropy"):
        _run(tiny, tmp_path, train={"epochs": 1, "bce_threshold": 0.2})


def test_networks_of_one_size_are_not_shown_another(tmp_path: Path) -> None:
    raw = {
        "name": "sizes",
        "dir": str(tmp_path / "run"),
        "device": "cpu",
        "method": {"name": "independent"},
        "peers": [{"network": "timm/vit_tiny_patch16_224"}],
        "data": {
            "dataset": "image_folder",
            "root": str(tmp_path),
            "global_batch": 2,
            "image": {"training_sizes": [[0, 160]]},
        },
        "train": {"epochs": 2},
    }
    for split in ("train", "val"):
        (tmp_path / split / "a").mkdir(parents=True)
        for name in ("0.jpeg", "1.jpeg"):
            (tmp_path / split / "a" / name).touch()
    with pytest.raises(
        ConfigError, match=r"data.image.training_sizes: timm/vit_tiny_patch16_224 cannot be shown images"
    ):
        check_run(validate(raw), Launch(0, 0, 1))
    raw["peers"] = [{"network": "timm/vit_tiny_patch16_224", "options": {"dynamic_img_size": True}}]
    check_run(validate(raw), Launch(0, 0, 1))
    raw["peers"] = [{"network": "timm/resnet18"}]
    check_run(validate(raw), Launch(0, 0, 1))


def test_a_recipe_is_written_and_read(tiny: Path, tmp_path: Path) -> None:
    config = _run(tiny, tmp_path / "run", train=_LOSS)
    written = tmp_path / "config.yaml"
    written.write_text(dump(config), encoding="utf-8")
    assert load(written) == config

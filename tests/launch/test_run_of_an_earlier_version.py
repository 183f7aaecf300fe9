"""A run that was started before the data had sections goes on, and is evaluated, exported and reported."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import yaml

from engine.config import ConfigError, RunConfig
from engine.config.identity import differences, identity, identity_of_cohort, read_identity
from engine.config.loading import load, load_run
from engine.preflight import check_run
from engine.ranks.collectives import Launch
from tests.launch.command import run_command
from tests.runs import assert_same_weights, small_run, train_here, weights
from tests.worlds import run_ranks

ROOT = Path(__file__).parents[2]

# As `--print-config` of that version wrote them: of a set of small images, and of configs/imagenet/dml_resnet50.yaml.
SMALL = """\
dataset: fashion_mnist
root: {root}
global_batch: 24
sampler: shuffle
views: shared
held_out: 0.0
mean: null
std: null
padding: 4
padding_mode: reflect
flip: true
"""
IMAGENET = """\
dataset: image_folder
root: data/imagenet
global_batch: 1024
sampler: shuffle
views: shared
held_out: 0.0
mean: null
std: null
image_size: 224
resize: 256
crop_area:
- 0.08
- 1.0
crop_ratio:
- 0.75
- 1.3333333333333333
decoder: auto
threads: 8
"""
LAUNCH = Launch(0, 0, 1)


def as_it_was(run: Path, data: str) -> None:
    """Puts the data section of that version into a run's config."""
    path = run / "config.yaml"
    path.write_text(yaml.safe_dump(yaml.safe_load(path.read_text()) | {"data": yaml.safe_load(data)}, sort_keys=False))


@pytest.fixture(scope="module")
def interrupted(tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of that version, after the first of its two epochs."""
    folder = tmp_path_factory.mktemp("interrupted") / "run"
    run_ranks(1, train_here, small_run(tiny, folder, train={"epochs": 1}, schedule={"name": "constant"}))
    as_it_was(folder, SMALL.format(root=tiny))
    return folder


@pytest.fixture
def run(interrupted: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(interrupted, tmp_path / "run"))


def of(tiny: Path, run: Path, **data: object) -> RunConfig:
    return small_run(tiny, run, schedule={"name": "constant"}, data=data)


def test_it_goes_on_as_if_nothing_had_happened(tiny: Path, run: Path, tmp_path: Path) -> None:
    run_ranks(1, train_here, of(tiny, run))
    run_ranks(1, train_here, of(tiny, tmp_path / "whole"))
    assert_same_weights(weights(run), weights(tmp_path / "whole"), relative=0)
    assert load(run / "config.yaml") == of(tiny, run)


def test_what_made_it_another_run_does_so_still(tiny: Path, run: Path) -> None:
    check_run(of(tiny, run), LAUNCH)
    with pytest.raises(ConfigError) as caught:
        check_run(of(tiny, run, augmentation={"flip": False}), LAUNCH)
    assert str(caught.value).startswith(
        f"data.augmentation.flip = False: the run in {run} was started with True; give this one another name= or dir="
    )


def test_it_is_evaluated_exported_and_reported(run: Path, tmp_path: Path) -> None:
    evaluate = ("evaluate", str(run), "data.augmentation.padding=2", "--json", str(tmp_path / "scores.json"))
    run_ranks(1, run_command, *evaluate)
    run_command("export", str(run), "--out", str(tmp_path / "exported"))
    run_command("report", str(run), "--out", str(tmp_path / "table"))
    assert json.loads((tmp_path / "scores.json").read_text())["images"] == 37
    assert list((tmp_path / "exported").glob("*.safetensors"))
    assert (tmp_path / "table.txt").is_file()


def test_an_old_key_over_it_is_refused_like_any_other(run: Path) -> None:
    code, _, err = run_command("evaluate", str(run), "data.padding=2", check=False)
    assert (code, err) == (2, "error: data.padding = 2: moved; write data.augmentation.padding\n")


def test_a_run_on_imagenet_is_the_same_with_another_decoder(tmp_path: Path) -> None:
    now = load(ROOT / "configs/imagenet/dml_resnet50.yaml", ["data.decoding={decoder: cpu, threads: 3}"])
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(now.model_dump(mode="json")))
    as_it_was(tmp_path, IMAGENET)
    assert load_run(tmp_path).data == load(ROOT / "configs/imagenet/dml_resnet50.yaml").data
    assert not differences(identity(load_run(tmp_path)), identity(now))
    larger = load(ROOT / "configs/imagenet/dml_resnet50.yaml", ["data.image.size=232"])
    assert differences(identity(load_run(tmp_path)), identity(larger)) == {"data.image.size": (224, 232)}


def test_what_a_job_of_that_version_left_is_of_the_same_run() -> None:
    """Jobs write who they are beside what they show; root, decoder and threads were never part of that."""
    config = load(
        ROOT / "configs/imagenet/codistillation_jobs_resnet50.yaml",
        ["placement.peer=a", "placement.meeting=/m"],
    )
    now = identity_of_cohort(config)
    old = {key: value for key, value in yaml.safe_load(IMAGENET).items() if key not in ("root", "decoder", "threads")}
    assert not differences(read_identity(json.dumps(now | {"data": old})), now)
    assert read_identity(json.dumps(now)) == now

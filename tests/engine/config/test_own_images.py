"""Validation images as the networks' libraries want them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from timm.data import create_transform, resolve_data_config
from timm.models import get_pretrained_cfg

from data_pipelines import open_pipeline
from engine.config import ConfigError, RunConfig
from engine.config.loading import dump, validate
from tests.data_pipelines.files import photo


def _run(root: Path, *networks: str, **image: Any) -> RunConfig:
    return validate(
        {
            "name": "own",
            "method": {"name": "independent"},
            "peers": [{"network": network} for network in networks],
            "data": {
                "dataset": "image_folder",
                "root": str(root),
                "global_batch": 2,
                "image": {"of_networks": True, **image},
                "decoding": {"decoder": "torchvision", "threads": 1},
            },
            "train": {"epochs": 1},
        }
    )


def test_the_numbers_are_those_of_timm_and_of_torchvision(tmp_path: Path) -> None:
    config = _run(tmp_path, "timm/deit_small_patch16_224", interpolation="bicubic")
    # timm: 224 pixels at a crop of 0.9, bicubic.
    assert (config.data.image.size, config.data.image.resize) == (224, 248)
    assert config.data.image.for_validation == "bicubic"
    config = _run(tmp_path, "torchvision/resnet50", size=64)
    assert (config.data.image.size, config.data.image.resize, config.data.image.for_validation) == (
        224,
        232,
        "bilinear",
    )
    assert not config.data.image.of_networks
    assert validate(_plain(config)) == config


def _plain(config: RunConfig) -> Any:
    import yaml

    return yaml.safe_load(dump(config))


def test_pixels_are_those_of_timms_own_transform(tmp_path: Path) -> None:
    for split in ("train", "val"):
        (tmp_path / split / "a").mkdir(parents=True)
        for index, size in enumerate([(300, 225), (225, 300)]):
            photo(index, *size).save(tmp_path / split / "a" / f"{index}.png")
    found = get_pretrained_cfg("test_vit")
    assert found is not None
    transform = create_transform(**resolve_data_config(pretrained_cfg=found.to_dict()), is_training=False)
    expected = torch.stack([transform(photo(index, *size)) for index, size in enumerate([(300, 225), (225, 300)])])
    config = _run(tmp_path, "timm/test_vit").data
    pipeline = open_pipeline(config, 0, torch.device("cpu"))
    [batch] = pipeline.evaluate(0, 1, 2)
    pipeline.close()
    levels = (batch.images - expected).abs() * 255 * torch.tensor(np.array(config.normalisation[1])).view(3, 1, 1)
    assert levels.mean() < 0.1
    assert levels.max() <= 3


@pytest.mark.parametrize(
    ("networks", "expected"),
    [
        (
            ["timm/resnet50", "torchvision/resnet50"],
            "timm/resnet50 wants resize 235, interpolation bicubic and torchvision/resnet50 wants resize 232, "
            "interpolation bilinear; all peers see the same images",
        ),
        (["cifar_resnet8_b"], "peers.0: cifar_resnet8_b is our own, and nobody says how it wants images"),
    ],
)
def test_what_nobody_says_and_what_differs_is_refused(tmp_path: Path, networks: list[str], expected: str) -> None:
    with pytest.raises(ConfigError) as caught:
        _run(tmp_path, *networks)
    assert expected in str(caught.value)
    assert str(caught.value).startswith("data.image.of_networks = True: ")

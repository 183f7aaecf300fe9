"""Validation images are those of torchvision's published pipeline, image by image, and are classified alike."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from PIL import Image
from torchvision import transforms
from torchvision.transforms import InterpolationMode

import models
from data_pipelines import DataConfig, open_pipeline
from tests.data_pipelines import cutting
from tests.data_pipelines.files import photo
from tests.marks import slow

_CPU = torch.device("cpu")
_MEAN, _STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
_ORDERS = {"bilinear": InterpolationMode.BILINEAR, "bicubic": InterpolationMode.BICUBIC}


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """24 JPEGs of the sizes that ImageNet has, upright, lying, smaller than what is cut out, and large."""
    folder = tmp_path_factory.mktemp("photos")
    sizes = [(500, 375), (375, 500), (500, 333), (333, 500), (640, 480), (180, 200), (1000, 300), (256, 256)]
    for split, count in (("train", 2), ("val", 24)):
        (folder / split / "a").mkdir(parents=True)
        for index in range(count):
            path = folder / split / "a" / f"{index:02d}.JPEG"
            photo(index, *sizes[index % len(sizes)]).save(path, quality=90)
    return folder


def _published(root: Path, interpolation: str) -> torch.Tensor:
    shown = transforms.Compose(
        [
            transforms.Resize(256, interpolation=_ORDERS[interpolation]),
            transforms.CenterCrop(224),
            transforms.ToTensor(),
            transforms.Normalize(_MEAN, _STD),
        ]
    )
    files = sorted((root / "val" / "a").iterdir())
    return torch.stack([shown(Image.open(path).convert("RGB")) for path in files])


def _ours(root: Path, interpolation: str, decoder: str) -> torch.Tensor:
    config = DataConfig(
        dataset="image_folder",
        root=root,
        global_batch=2,
        image={"interpolation": interpolation},
        decoding={"decoder": decoder, "threads": 2},
    )
    pipeline = open_pipeline(config, 1, _CPU)
    rows = cutting.join(list(pipeline.evaluate(0, 1, 5)))
    pipeline.close()
    assert rows.ids.tolist() == list(range(24))
    return rows.images


def _levels(one: torch.Tensor, other: torch.Tensor) -> torch.Tensor:
    return (one - other).abs() * 255 * torch.tensor(_STD).view(3, 1, 1)


@pytest.mark.parametrize("decoder", ["torchvision", "cpu"])
@pytest.mark.parametrize("interpolation", ["bilinear", slow("bicubic")])
def test_pixels_and_classes_are_those_of_the_published_pipeline(root: Path, interpolation: str, decoder: str) -> None:
    if decoder == "cpu":
        pytest.importorskip("nvidia.dali")
    expected, found = _published(root, interpolation), _ours(root, interpolation, decoder)
    assert _levels(found, expected).flatten(1).mean(1).max() < 0.3
    assert _levels(found, expected).max() <= 3
    other = _published(root, "bicubic" if interpolation == "bilinear" else "bilinear")
    assert _levels(found, other).flatten(1).mean(1).max() > 0.5
    torch.manual_seed(0)
    network = models.create("timm/test_resnet", 1000).train()
    with torch.no_grad():
        network(expected)  # BatchNorm statistics of something
        network.eval()
        bias = network(expected).mean(0)  # so that no class is preferred for all images
        published, ours = network(expected) - bias, network(found) - bias
    assert len(published.argmax(1).unique()) > 10
    assert ours.argmax(1).tolist() == published.argmax(1).tolist()

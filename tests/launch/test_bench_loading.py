"""The benches of the data path run, and print a ratio against each loader that one would use instead."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

ROOT = Path(__file__).parents[2]


def bench(*words: str) -> str:
    done = subprocess.run(
        [sys.executable, str(ROOT / "launch" / "bench"), *words], cwd=ROOT, capture_output=True, text=True, check=True
    )
    return done.stdout


@pytest.mark.slow
def test_photos_are_timed_against_other_loaders(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    for split in ("train", "val"):
        for name in ("a", "b"):
            (tmp_path / split / name).mkdir(parents=True)
            for number in range(6):
                pixels = rng.integers(0, 256, (48, 64, 3), dtype=np.uint8)
                Image.fromarray(pixels).save(tmp_path / split / name / f"{number}.jpg")
    words = ("--batch", "4", "--size", "32", "--rounds", "2", "--threads", "1", "--network", "cifar_resnet8_b")
    printed = bench("data", "--folder", str(tmp_path), *words)
    for other in ("torchvision (PIL)", "timm (PIL)"):
        assert f" / {other}: " in printed
    assert "would have it wait" in printed
    printed = bench("trainer", "--folder", str(tmp_path), *words)
    assert "timm / ours: " in printed


@pytest.mark.slow
def test_small_images_are_timed_against_other_loaders() -> None:
    printed = bench("resident", "--quick", "--rounds", "2", "--threads", "1")
    for other in ("torchvision", "timm (PIL)"):
        assert f"resident / {other}: " in printed


@pytest.mark.slow
def test_listings_are_timed_against_image_folder(tmp_path: Path) -> None:
    printed = bench("listing", "--images", "60", "--rounds", "2", "--folder", str(tmp_path))
    assert "listing: 60 files in 60 folders" in printed
    assert " ImageFolder / anew: " in printed
    assert " ImageFolder / kept: " in printed
    assert not list(tmp_path.iterdir())

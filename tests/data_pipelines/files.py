"""Writes data sets in their own formats, small and deterministic."""

import gzip
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image


def write_idx(path: Path, array: NDArray[np.uint8], magic: int | None = None) -> None:
    """Writes an IDX file, gzipped where its name ends in .gz."""
    header = np.array([0x0800 + array.ndim if magic is None else magic, *array.shape], ">u4").tobytes()
    content = header + array.tobytes()
    path.write_bytes(gzip.compress(content) if path.suffix == ".gz" else content)


def write_fashion(root: Path, train: int = 24, test: int = 11, suffix: str = ".gz") -> dict[str, NDArray[np.uint8]]:
    """Writes four IDX files of random images; gives the arrays by the stem of the file."""
    rng = np.random.default_rng(0)
    arrays = {}
    for stem, size in (("train", train), ("t10k", test)):
        arrays[f"{stem}-images-idx3-ubyte"] = rng.integers(0, 256, (size, 28, 28), np.uint8)
        arrays[f"{stem}-labels-idx1-ubyte"] = (np.arange(size) % 10).astype(np.uint8)
    root.mkdir(parents=True, exist_ok=True)
    for name, array in arrays.items():
        write_idx(root / f"{name}{suffix}", array)
    return arrays


def write_records(path: Path, labels: list[tuple[int, ...]], rows: int) -> NDArray[np.uint8]:
    """Writes a CIFAR file of full length: random records, then zeros that take no space on disk; gives the records."""
    rng = np.random.default_rng(len(path.name))
    pixels = rng.integers(0, 256, (len(labels), 3072), np.uint8)
    records = np.concatenate([np.array(labels, np.uint8), pixels], axis=1)
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("wb") as file:
        file.write(records.tobytes())
        file.truncate(rows * records.shape[1])
    return records


def photo(seed: int, width: int, height: int) -> Image.Image:
    """Draws something with the smooth parts, edges and grain of a photo, RGB."""
    rng = np.random.default_rng(seed)
    y, x = np.mgrid[0:height, 0:width] / max(width, height)
    channels = []
    for _ in range(3):
        a, b, c, d = rng.uniform(2, 9, 4)
        channels.append(np.sin(a * x + b * y) + np.cos(c * x - d * y * y))
    scene = 127 + 50 * np.stack(channels, axis=2)
    top, left = rng.integers(0, height // 2), rng.integers(0, width // 2)
    scene[top : top + height // 3, left : left + width // 3] += rng.uniform(-80, 80, 3)
    return Image.fromarray((scene + rng.normal(0, 6, scene.shape)).clip(0, 255).astype(np.uint8))


def write_photos(root: Path, classes: int = 3, train: int = 9, val: int = 5) -> None:
    """Writes an ImageNet-style folder of varied sizes; among them grey, CMYK, very tall, very wide, rotated and PNG."""
    for split, count in (("train", train), ("val", val)):
        for label in range(classes):
            folder = root / split / f"n{label:03d}"
            folder.mkdir(parents=True)
            for index in range(count):
                seed = 1000 * label + 10 * index + (split == "val")
                image = photo(seed, 90 + seed * 7 % 130, 90 + seed * 11 % 110)
                path = folder / f"{index:02d}.JPEG"
                if index == 1:
                    image = image.convert("L")
                elif index == 2:
                    image = photo(seed, 80, 300) if label else photo(seed, 300, 80)
                elif index == 3 and label == 0:
                    image = image.convert("CMYK")
                elif index == 3:
                    path = path.with_suffix(".png")
                exif = Image.Exif()
                if index == 4:
                    exif[0x0112] = 6  # "turn it by 90 degrees", which nobody is to obey
                image.save(path, quality=90, exif=exif)

"""Arrays of images in NumPy's `.npz` files. Nothing in them is ever unpickled, as a pickle can run any code."""

import zipfile
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from data_pipelines.damage import DataError
from data_pipelines.sources.standard_sets import Split

GET = (
    "npz wants images uint8 [N, H, W] or [N, H, W, C] and labels [N]: in one file as x_train, y_train, x_test, y_test "
    "or train_images, train_labels, val_images, val_labels; or, for the split of val_root or a folder of train.npz and "
    "val.npz, as images and labels"
)
_NAMES = {"train": ("train",), "val": ("val", "valid", "validation", "test")}
_CLASSES = ("classes", "class_names")


def described(root: Path) -> tuple[int, int]:
    """(side, channels) of the training images, by the file's header. Raises: DataError."""
    path, images, _ = _find(root, None, "train")
    return _shape(path, images)[1:]


def statistics(root: Path) -> dict[str, list[float]]:
    """`mean` and `std` of each channel of the training images, of pixels in [0, 1], to four places.

    Raises:
        DataError: they cannot be read.
    """
    path, images, _ = _find(root, None, "train")
    pixels = _pixels(path, images)
    counts = np.stack([np.bincount(pixels[..., c].ravel(), minlength=256) for c in range(pixels.shape[-1])])
    values, total = np.arange(256) / 255, counts.sum(1)
    mean = counts @ values / total
    spread = np.sqrt(counts @ values**2 / total - mean**2)
    # Images of one colour have no spread to divide by.
    return {
        "mean": [round(x, 4) for x in mean.tolist()],
        "std": [max(round(x, 4), 1e-4) for x in spread.tolist()],
    }


def sizes(root: Path, val_root: Path | None) -> tuple[NDArray[np.int64], int, tuple[str, ...]]:
    """Labels for training, samples for validation, and classes; without a look at the images. Raises: DataError."""
    counts, labels = [], []
    for split in ("train", "val"):
        path, images, targets = _find(root, val_root, split)
        counts.append(_shape(path, images)[0])
        labels.append(_labels(path, targets, counts[-1]))
    return labels[0], counts[1], _class_names(root, labels)


def read(root: Path, val_root: Path | None, side: int, channels: int) -> tuple[Split, Split, tuple[str, ...]]:
    """Both splits, and the names of the classes.

    Raises:
        DataError: something is missing, of another kind, or of another shape than [N, side, side, channels].
    """
    splits = []
    for split in ("train", "val"):
        path, images, targets = _find(root, val_root, split)
        if (found := _shape(path, images)[1:]) != (side, channels):
            raise DataError(
                f"{path}: {images}: expected images of {side} pixels and {channels} channels, found {found[0]} and "
                f"{found[1]}"
            )
        pixels = _pixels(path, images)
        splits.append(Split(pixels, _labels(path, targets, len(pixels))))
    train, val = splits
    return train, val, _class_names(root, [train.labels, val.labels])


def read_validation(root: Path, val_root: Path | None, side: int, channels: int) -> tuple[Split, tuple[str, ...]]:
    """The validation split alone. Raises: DataError, as `read`."""
    path, images, targets = _find(root, val_root or root, "val")
    if (found := _shape(path, images)[1:]) != (side, channels):
        raise DataError(f"{path}: {images}: expected [N, {side}, {side}, {channels}], found images of {found}")
    pixels = _pixels(path, images)
    labels = _labels(path, targets, len(pixels))
    return Split(pixels, labels), _class_names(path, [labels])


def _find(root: Path, val_root: Path | None, split: str) -> tuple[Path, str, str]:
    """The file of a split, and its names of images and labels."""
    key = "val_root" if val_root is not None and split == "val" else "root"
    place = val_root if val_root is not None and split == "val" else root
    own = val_root is not None and split == "val"
    if place.is_dir():
        paths = [place / f"{name}.npz" for name in _NAMES[split]]
        path, own = next((path for path in paths if path.is_file()), paths[0]), True
    else:
        path = place
    if not path.is_file():
        raise DataError(f"{key}: {path}: no such file. {GET}")
    with _opened(path) as file:
        members = {name.removesuffix(".npy") for name in file.namelist()}
    patterns = [pair for name in _NAMES[split] for pair in _pairs(name)]
    if own:
        patterns += [("images", "labels"), ("x", "y"), ("data", "labels")]
    for images, labels in patterns:
        if {images, labels} <= members:
            return path, images, labels
    raise DataError(f"{path}: expected images and labels for {split}, found {', '.join(sorted(members))}. {GET}")


def _pairs(name: str) -> list[tuple[str, str]]:
    return [(f"x_{name}", f"y_{name}"), (f"{name}_images", f"{name}_labels"), (f"{name}_x", f"{name}_y")]


@contextmanager
def _opened(path: Path) -> Iterator[zipfile.ZipFile]:
    try:
        with zipfile.ZipFile(path) as file:
            yield file
    except (OSError, EOFError, zipfile.BadZipFile, zlib.error, ValueError) as error:
        if isinstance(error, DataError):
            raise
        raise DataError(f"{path}: expected a whole .npz file, found a damaged one: {error}. {GET}") from None


def _shape(path: Path, name: str) -> tuple[int, int, int]:
    """(samples, side, channels), by the header."""
    with _opened(path) as file, file.open(f"{name}.npy") as member:
        version = np.lib.format.read_magic(member)
        header = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
        shape, _, dtype = header(member)
    if dtype != np.uint8 or len(shape) not in (3, 4) or shape[1] != shape[2] or not shape[0]:
        raise DataError(
            f"{path}: {name}: expected square images, uint8 [N, H, W] or [N, H, W, C], found {dtype} {shape}"
        )
    channels = shape[3] if len(shape) == 4 else 1
    if channels not in (1, 3):
        raise DataError(f"{path}: {name}: expected 1 or 3 channels, found {channels} in {dtype} {shape}")
    return shape[0], shape[1], channels


def _array(path: Path, name: str) -> np.ndarray:
    with _opened(path) as file, file.open(f"{name}.npy") as member:
        return np.lib.format.read_array(member, allow_pickle=False)


def _pixels(path: Path, name: str) -> NDArray[np.uint8]:
    found = _array(path, name)
    return np.ascontiguousarray(found if found.ndim == 4 else found[..., None])


def _labels(path: Path, name: str, count: int) -> NDArray[np.int64]:
    found = _array(path, name)
    if found.ndim == 2 and found.shape[1] == 1:
        found = found[:, 0]
    if found.dtype.kind not in "iu" or found.shape != (count,):
        raise DataError(
            f"{path}: {name}: expected a class for each of {count} images, found {found.dtype} {found.shape}"
        )
    if found.min() < 0:
        raise DataError(f"{path}: {name}: expected classes from 0 on, found {found.min()}")
    return found.astype(np.int64)


def _class_names(root: Path, labels: list[NDArray[np.int64]]) -> tuple[str, ...]:
    count = max(int(each.max()) for each in labels) + 1
    paths = [root / "train.npz"] if root.is_dir() else [root]
    for path in paths:
        with _opened(path) as file:
            members = {name.removesuffix(".npy") for name in file.namelist()}
        for key in members.intersection(_CLASSES):
            names = tuple(map(str, _array(path, key).tolist()))
            if len(names) < count or len(set(names)) < len(names):
                raise DataError(f"{path}: {key}: expected {count} names, each once, found {len(names)}")
            return names
    return tuple(str(k) for k in range(count))

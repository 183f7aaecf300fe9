"""The standard files of Fashion-MNIST, CIFAR-10 and CIFAR-100.

Nothing is unpickled, as a pickle can run any code, and no archive is extracted: the binary formats hold the same
images.
"""

import gzip
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from data_pipelines.contract import DataError

_GET_FASHION = (
    "Get the four *-ubyte.gz files from https://github.com/zalandoresearch/fashion-mnist, "
    "or Debian's package: apt-get download dataset-fashion-mnist && dpkg -x dataset-fashion-mnist_*.deb DIR"
)
_GET_CIFAR = (
    "Get the binary version: curl -O https://www.cs.toronto.edu/~kriz/cifar-{classes}-binary.tar.gz "
    "&& tar -xzf cifar-{classes}-binary.tar.gz"
)


@dataclass(frozen=True)
class Split:
    """One split of a data set: images uint8 [N, H, W, C] and labels int64 [N]."""

    images: NDArray[np.uint8]
    labels: NDArray[np.int64]


@dataclass(frozen=True)
class Standard:
    """What is known of a data set before its files are opened.

    Attributes:
        side: side of the square images, in pixels.
        channels: channels of an image.
        mean: of the training images, per channel, pixels in [0, 1].
        std: of the training images, per channel, pixels in [0, 1].
        class_names: in the order of the labels.
        sizes: given the folder, checks the files without reading their bodies; samples for training and validation.
        read: given the folder, reads (training split, validation split).
    """

    side: int
    channels: int
    mean: tuple[float, ...]
    std: tuple[float, ...]
    class_names: tuple[str, ...]
    sizes: Callable[[Path], tuple[int, int]]
    read: Callable[[Path], tuple[Split, Split]]


# --- Fashion-MNIST: IDX files, plain or gzipped ---

_IDX_STEMS = ("train", "t10k")
_IDX_IMAGES, _IDX_LABELS = 0x0803, 0x0801  # unsigned bytes in three dimensions, and in one


def _fashion_sizes(root: Path) -> tuple[int, int]:
    _require_folder(root, _GET_FASHION)
    train, test = (_idx_pair(root, stem)[0] for stem in _IDX_STEMS)
    return train, test


def _fashion_read(root: Path) -> tuple[Split, Split]:
    _fashion_sizes(root)
    train, test = (_idx_split(root, stem) for stem in _IDX_STEMS)
    return train, test


def _idx_pair(root: Path, stem: str) -> tuple[int, Path, Path]:
    """Finds and checks the two files of a split; gives its size and their paths."""
    images = _idx_path(root, f"{stem}-images-idx3-ubyte")
    labels = _idx_path(root, f"{stem}-labels-idx1-ubyte")
    shape = _idx_shape(images, _IDX_IMAGES)
    if shape[1:] != (28, 28):
        raise DataError(f"{images}: expected images of 28 x 28 pixels, found {shape[1]} x {shape[2]}. {_GET_FASHION}")
    (count,) = _idx_shape(labels, _IDX_LABELS)
    if count != shape[0]:
        raise DataError(
            f"{labels}: expected {shape[0]} labels, one for each image of {images.name}, found {count}. {_GET_FASHION}"
        )
    return shape[0], images, labels


def _idx_split(root: Path, stem: str) -> Split:
    size, images, labels = _idx_pair(root, stem)
    pixels = np.frombuffer(_idx_bytes(images)[16:], np.uint8).reshape(size, 28, 28, 1)
    classes = np.frombuffer(_idx_bytes(labels)[8:], np.uint8)
    _require_classes(labels, classes, 10, _GET_FASHION)
    return Split(pixels, classes.astype(np.int64))


def _idx_path(root: Path, name: str) -> Path:
    for path in (root / f"{name}.gz", root / name):
        if path.is_file():
            return path
    raise DataError(f"{root / name}: no such file, nor {name}.gz. {_GET_FASHION}")


def _idx_shape(path: Path, magic: int) -> tuple[int, ...]:
    """Reads the header and checks that the file is as long as the header says."""
    dimensions = magic & 0xFF
    header = np.frombuffer(_idx_bytes(path, 4 + 4 * dimensions).ljust(4 + 4 * dimensions, b"\0"), ">u4")
    if header[0] != magic:
        raise DataError(f"{path}: expected the magic number 0x{magic:08x}, found 0x{header[0]:08x}. {_GET_FASHION}")
    shape = tuple(int(extent) for extent in header[1:])
    expected = 4 + 4 * dimensions + int(np.prod(shape, dtype=object))
    found = path.stat().st_size
    if path.suffix == ".gz":
        # A gzip file ends with the length of its content; cut short, it ends with anything else.
        with path.open("rb") as file:
            file.seek(-4, 2)
            found = int.from_bytes(file.read(4), "little")
    _require_bytes(path, expected, found, _GET_FASHION)
    return shape


def _idx_bytes(path: Path, count: int = -1) -> bytes:
    try:
        with gzip.open(path) if path.suffix == ".gz" else path.open("rb") as file:
            return file.read(count)
    except (EOFError, gzip.BadGzipFile, zlib.error) as error:
        raise DataError(f"{path}: expected a whole gzip file, found a damaged one: {error}. {_GET_FASHION}") from error


# --- CIFAR: records of label bytes and 3072 pixel bytes, channel by channel ---


@dataclass(frozen=True)
class _Cifar:
    classes: int
    label_bytes: int  # the last one is the class; CIFAR-100 has the coarse class before it
    rows: int  # of a training file
    train: tuple[str, ...]
    test: str
    folder: str  # that the binary archive makes
    pickled: str  # a file that only the Python archive makes

    @property
    def get(self) -> str:
        return _GET_CIFAR.format(classes=self.classes)

    @property
    def record(self) -> int:
        return self.label_bytes + 3072

    def files(self, root: Path) -> list[tuple[Path, int]]:
        """Finds and checks the files; gives the path and the number of rows of each, the test file last."""
        _require_folder(root, self.get)
        folder = root / self.folder if (root / self.folder).is_dir() else root
        names = [*self.train, self.test]
        missing = [folder / name for name in names if not (folder / name).is_file()]
        pickled = Path(self.pickled)
        if missing and any((root / path).is_file() for path in (pickled, pickled.name)):
            raise DataError(
                f"{missing[0]}: no such file; only the pickled Python version is there, which is never read, "
                f"as a pickle can run any code. {self.get}"
            )
        if missing:
            raise DataError(f"{missing[0]}: no such file. {self.get}")
        rows = [self.rows] * len(self.train) + [10_000]
        files = [(folder / name, count) for name, count in zip(names, rows, strict=True)]
        for path, count in files:
            _require_bytes(path, count * self.record, path.stat().st_size, self.get)
        return files

    def sizes(self, root: Path) -> tuple[int, int]:
        *train, (_, test) = self.files(root)
        return sum(count for _, count in train), test

    def read(self, root: Path) -> tuple[Split, Split]:
        *train, test = (self._read_file(path) for path, _ in self.files(root))
        images, labels = ([getattr(split, key) for split in train] for key in ("images", "labels"))
        return Split(np.concatenate(images), np.concatenate(labels)), test

    def _read_file(self, path: Path) -> Split:
        records = np.fromfile(path, np.uint8).reshape(-1, self.record)
        labels = records[:, self.label_bytes - 1]
        _require_classes(path, labels, self.classes, self.get)
        pixels = records[:, self.label_bytes :].reshape(-1, 3, 32, 32).transpose(0, 2, 3, 1)
        return Split(np.ascontiguousarray(pixels), labels.astype(np.int64))


_CIFAR10 = _Cifar(
    classes=10,
    label_bytes=1,
    rows=10_000,
    train=tuple(f"data_batch_{i}.bin" for i in range(1, 6)),
    test="test_batch.bin",
    folder="cifar-10-batches-bin",
    pickled="cifar-10-batches-py/data_batch_1",
)
_CIFAR100 = _Cifar(
    classes=100,
    label_bytes=2,
    rows=50_000,
    train=("train.bin",),
    test="test.bin",
    folder="cifar-100-binary",
    pickled="cifar-100-python/train",
)


def _require_folder(root: Path, get: str) -> None:
    if not root.is_dir():
        raise DataError(f"root: {root} is not a folder. {get}")


def _require_bytes(path: Path, expected: int, found: int, get: str) -> None:
    if found != expected:
        what = "is cut short" if found < expected else "is damaged or of another kind"
        raise DataError(f"{path} {what}: expected {expected} bytes, found {found}. {get}")


def _require_classes(path: Path, labels: NDArray[np.uint8], classes: int, get: str) -> None:
    wrong = np.flatnonzero(labels >= classes)
    if wrong.size:
        raise DataError(
            f"{path}: expected labels 0 to {classes - 1}, found {labels[wrong[0]]} in row {wrong[0]}. {get}"
        )


_FASHION = Standard(
    side=28,
    channels=1,
    # Computed from the 60,000 training images: 0.286041 and 0.353024.
    mean=(0.2860,),
    std=(0.3530,),
    class_names=(
        *("T-shirt/top", "Trouser", "Pullover", "Dress", "Coat"),
        *("Sandal", "Shirt", "Sneaker", "Bag", "Ankle boot"),
    ),
    sizes=_fashion_sizes,
    read=_fashion_read,
)

_CIFAR10_CLASSES = "airplane automobile bird cat deer dog frog horse ship truck"
_CIFAR100_CLASSES = """
apple aquarium_fish baby bear beaver bed bee beetle bicycle bottle bowl boy bridge bus butterfly camel can castle
caterpillar cattle chair chimpanzee clock cloud cockroach couch crab crocodile cup dinosaur dolphin elephant
flatfish forest fox girl hamster house kangaroo keyboard lamp lawn_mower leopard lion lizard lobster man maple_tree
motorcycle mountain mouse mushroom oak_tree orange orchid otter palm_tree pear pickup_truck pine_tree plain plate
poppy porcupine possum rabbit raccoon ray road rocket rose sea seal shark shrew skunk skyscraper snail snake spider
squirrel streetcar sunflower sweet_pepper table tank telephone television tiger tractor train trout tulip turtle
wardrobe whale willow_tree wolf woman worm
"""

STANDARD: dict[str, Standard] = {
    "fashion_mnist_subset": _FASHION,
    "fashion_mnist": _FASHION,
    "cifar10": Standard(
        side=32,
        channels=3,
        mean=(0.4914, 0.4822, 0.4465),
        std=(0.2470, 0.2435, 0.2616),
        class_names=tuple(_CIFAR10_CLASSES.split()),
        sizes=_CIFAR10.sizes,
        read=_CIFAR10.read,
    ),
    "cifar100": Standard(
        side=32,
        channels=3,
        mean=(0.5071, 0.4866, 0.4409),
        std=(0.2675, 0.2565, 0.2761),
        class_names=tuple(_CIFAR100_CLASSES.split()),
        sizes=_CIFAR100.sizes,
        read=_CIFAR100.read,
    ),
}

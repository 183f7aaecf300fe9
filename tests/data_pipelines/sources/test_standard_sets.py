"""The standard files: what is read, and what is said of files that are missing, cut short or wrong."""

import os
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from data_pipelines import DataConfig, DataError, check_files, open_pipeline
from data_pipelines.sources.standard_sets import STANDARD
from tests.data_pipelines.files import write_fashion, write_idx, write_records

_GET_FASHION = (
    "Get the four *-ubyte.gz files from https://github.com/zalandoresearch/fashion-mnist, "
    "or Debian's package: apt-get download dataset-fashion-mnist && dpkg -x dataset-fashion-mnist_*.deb DIR"
)
_GET_CIFAR10 = (
    "Get the binary version: curl -O https://www.cs.toronto.edu/~kriz/cifar-10-binary.tar.gz "
    "&& tar -xzf cifar-10-binary.tar.gz"
)
_GET_CIFAR100 = _GET_CIFAR10.replace("cifar-10-", "cifar-100-")


def _write_cifar10(folder: Path) -> list[np.ndarray]:
    names = [*(f"data_batch_{i}.bin" for i in range(1, 6)), "test_batch.bin"]
    return [write_records(folder / name, [(i,), (9,), (3,)], 10_000) for i, name in enumerate(names)]


def _write_cifar100(folder: Path) -> list[np.ndarray]:
    train = write_records(folder / "train.bin", [(19, 99), (0, 7)], 50_000)
    return [train, write_records(folder / "test.bin", [(4, 30)], 10_000)]


def _pixel(record: np.ndarray, y: int, x: int) -> list[int]:
    return [int(record[len(record) - 3072 + channel * 1024 + y * 32 + x]) for channel in range(3)]


@pytest.mark.parametrize("suffix", [".gz", ""])
def test_fashion_mnist(tmp_path: Path, suffix: str) -> None:
    arrays = write_fashion(tmp_path, suffix=suffix)
    train, test = STANDARD["fashion_mnist"].read(tmp_path)
    assert STANDARD["fashion_mnist"].sizes(tmp_path) == (24, 11)
    assert np.array_equal(train.images[..., 0], arrays["train-images-idx3-ubyte"])
    assert np.array_equal(test.labels, arrays["t10k-labels-idx1-ubyte"])
    assert (train.images.shape, train.images.dtype, train.labels.dtype) == ((24, 28, 28, 1), np.uint8, np.int64)


@pytest.mark.parametrize("inner", ["", "cifar-10-batches-bin"])
def test_cifar10(tmp_path: Path, inner: str) -> None:
    records = _write_cifar10(tmp_path / inner)
    train, test = STANDARD["cifar10"].read(tmp_path)
    assert STANDARD["cifar10"].sizes(tmp_path) == (50_000, 10_000)
    assert (train.images.shape, test.images.shape) == ((50_000, 32, 32, 3), (10_000, 32, 32, 3))
    assert train.labels[[0, 1, 2, 3, 10_000, 40_000]].tolist() == [0, 9, 3, 0, 1, 4]
    assert train.images[20_001, 5, 7].tolist() == _pixel(records[2][1], 5, 7)
    assert test.images[2, 31, 30].tolist() == _pixel(records[5][2], 31, 30)


@pytest.mark.parametrize("inner", ["", "cifar-100-binary"])
def test_cifar100_takes_the_fine_label(tmp_path: Path, inner: str) -> None:
    records = _write_cifar100(tmp_path / inner)
    train, test = STANDARD["cifar100"].read(tmp_path)
    assert (len(train.labels), len(test.labels)) == STANDARD["cifar100"].sizes(tmp_path) == (50_000, 10_000)
    assert train.labels[:3].tolist() == [99, 7, 0]
    assert test.labels[0] == 30
    assert train.images[1, 11, 2].tolist() == _pixel(records[0][1], 11, 2)
    names = STANDARD["cifar100"].class_names
    assert (len(names), names[0], names[99]) == (100, "apple", "worm")


def test_the_subset_that_comes_with_the_package() -> None:
    config = DataConfig(dataset="fashion_mnist_subset", global_batch=256)
    check_files(config)
    pipeline = open_pipeline(config, 0, torch.device("cpu"))
    assert (pipeline.train_size, pipeline.eval_size, pipeline.num_classes) == (12_000, 2_000, 10)
    assert (pipeline.channels, pipeline.image_size, pipeline.steps_per_epoch) == (1, 28, 46)
    assert pipeline.class_names is not None
    assert pipeline.class_names[9] == "Ankle boot"
    train, test = STANDARD["fashion_mnist"].read(config.folder)
    assert np.bincount(train.labels).tolist() == [1200] * 10
    assert np.bincount(test.labels).tolist() == [200] * 10


# --- errors: a function that breaks good files in ``root``, and what is then said ---


def _cut_plain(root: Path) -> None:
    (root / "train-images-idx3-ubyte.gz").unlink()
    write_idx(root / "train-images-idx3-ubyte", np.zeros((24, 28, 28), np.uint8))
    with (root / "train-images-idx3-ubyte").open("rb+") as file:
        file.truncate(10_000)


def _cut_gzip(root: Path) -> None:
    path = root / "train-images-idx3-ubyte.gz"
    path.write_bytes(path.read_bytes()[:-4] + (5000).to_bytes(4, "little"))


def _cut_gzip_head(root: Path) -> None:
    path = root / "train-images-idx3-ubyte.gz"
    path.write_bytes(path.read_bytes()[:9])


_FASHION_ERRORS: list[tuple[Callable[[Path], object], str]] = [
    (
        lambda root: (root / "t10k-labels-idx1-ubyte.gz").unlink(),
        "{root}/t10k-labels-idx1-ubyte: no such file, nor t10k-labels-idx1-ubyte.gz.",
    ),
    (_cut_plain, "{root}/train-images-idx3-ubyte is cut short: expected 18832 bytes, found 10000."),
    (_cut_gzip, "{root}/train-images-idx3-ubyte.gz is cut short: expected 18832 bytes, found 5000."),
    (
        _cut_gzip_head,
        "{root}/train-images-idx3-ubyte.gz: expected a whole gzip file, found a damaged one: "
        "Compressed file ended before the end-of-stream marker was reached.",
    ),
    (
        lambda root: write_idx(root / "train-images-idx3-ubyte.gz", np.zeros((24, 28, 28), np.uint8), magic=0x0D03),
        "{root}/train-images-idx3-ubyte.gz: expected the magic number 0x00000803, found 0x00000d03.",
    ),
    (
        lambda root: (root / "train-images-idx3-ubyte.gz").write_bytes(b"no gzip at all"),
        "{root}/train-images-idx3-ubyte.gz: expected a whole gzip file, found a damaged one: "
        "Not a gzipped file (b'no').",
    ),
    (
        lambda root: write_idx(root / "train-images-idx3-ubyte.gz", np.zeros((24, 32, 32), np.uint8)),
        "{root}/train-images-idx3-ubyte.gz: expected images of 28 x 28 pixels, found 32 x 32.",
    ),
    (
        lambda root: write_idx(root / "train-labels-idx1-ubyte.gz", np.zeros(23, np.uint8)),
        "{root}/train-labels-idx1-ubyte.gz: expected 24 labels, one for each image of train-images-idx3-ubyte.gz, "
        "found 23.",
    ),
]


@pytest.mark.parametrize(("breaks", "message"), _FASHION_ERRORS)
def test_fashion_mnist_errors(tmp_path: Path, breaks: Callable[[Path], object], message: str) -> None:
    write_fashion(tmp_path)
    breaks(tmp_path)
    with pytest.raises(DataError) as caught:
        check_files(DataConfig(dataset="fashion_mnist", root=tmp_path, global_batch=8))
    assert str(caught.value) == f"{message.format(root=tmp_path)} {_GET_FASHION}"


def test_a_label_out_of_range(tmp_path: Path) -> None:
    write_fashion(tmp_path)
    write_idx(tmp_path / "t10k-labels-idx1-ubyte.gz", np.array([0, 1, 2, 10, 4, 11, 6, 7, 8, 9, 0], np.uint8))
    with pytest.raises(DataError) as caught:
        STANDARD["fashion_mnist"].read(tmp_path)
    message = f"{tmp_path}/t10k-labels-idx1-ubyte.gz: expected labels 0 to 9, found 10 in row 3. {_GET_FASHION}"
    assert str(caught.value) == message


def test_a_gzip_cut_in_its_middle(tmp_path: Path) -> None:
    write_fashion(tmp_path)
    path = tmp_path / "train-images-idx3-ubyte.gz"
    whole = path.read_bytes()
    path.write_bytes(whole[: len(whole) // 2] + whole[-4:])  # as bad as can be: the length at its end is right
    with pytest.raises(DataError) as caught:
        STANDARD["fashion_mnist"].read(tmp_path)
    assert str(caught.value).startswith(f"{path}: expected a whole gzip file, found a damaged one: ")
    assert str(caught.value).endswith(_GET_FASHION)


_CIFAR_ERRORS: list[tuple[str, Callable[[Path], object], str]] = [
    ("cifar10", lambda root: (root / "data_batch_3.bin").unlink(), "{root}/data_batch_3.bin: no such file."),
    (
        "cifar10",
        lambda root: [path.rename(path.with_suffix("")) for path in root.glob("*.bin")],
        "{root}/data_batch_1.bin: no such file; only the pickled Python version is there, which is never read, "
        "as a pickle can run any code.",
    ),
    (
        "cifar10",
        lambda root: os.truncate(root / "test_batch.bin", 30_729_999),
        "{root}/test_batch.bin is cut short: expected 30730000 bytes, found 30729999.",
    ),
    (
        "cifar100",
        lambda root: os.truncate(root / "test.bin", 30_740_001),
        "{root}/test.bin is damaged or of another kind: expected 30740000 bytes, found 30740001.",
    ),
    (
        "cifar100",
        lambda root: [path.rename(path.with_suffix("")) for path in root.glob("*.bin")],
        "{root}/train.bin: no such file; only the pickled Python version is there, which is never read, "
        "as a pickle can run any code.",
    ),
]


@pytest.mark.parametrize(("dataset", "breaks", "message"), _CIFAR_ERRORS)
def test_cifar_errors(tmp_path: Path, dataset: str, breaks: Callable[[Path], object], message: str) -> None:
    _write_cifar10(tmp_path) if dataset == "cifar10" else _write_cifar100(tmp_path)
    breaks(tmp_path)
    with pytest.raises(DataError) as caught:
        check_files(DataConfig(dataset=dataset, root=tmp_path, global_batch=8))
    get = _GET_CIFAR10 if dataset == "cifar10" else _GET_CIFAR100
    assert str(caught.value) == f"{message.format(root=tmp_path)} {get}"


def test_the_folder_of_the_pickled_archive_is_recognised(tmp_path: Path) -> None:
    (tmp_path / "cifar-10-batches-py").mkdir()
    (tmp_path / "cifar-10-batches-py/data_batch_1").touch()
    with pytest.raises(DataError, match="only the pickled Python version is there, which is never read"):
        check_files(DataConfig(dataset="cifar10", root=tmp_path, global_batch=8))


def test_a_cifar_label_out_of_range(tmp_path: Path) -> None:
    _write_cifar100(tmp_path)
    write_records(tmp_path / "test.bin", [(4, 30), (4, 100)], 10_000)
    with pytest.raises(DataError) as caught:
        STANDARD["cifar100"].read(tmp_path)
    message = f"{tmp_path}/test.bin: expected labels 0 to 99, found 100 in row 1. {_GET_CIFAR100}"
    assert str(caught.value) == message


@pytest.mark.parametrize(("dataset", "get"), [("fashion_mnist", _GET_FASHION), ("cifar100", _GET_CIFAR100)])
def test_no_root(tmp_path: Path, dataset: str, get: str) -> None:
    with pytest.raises(DataError) as caught:
        check_files(DataConfig(dataset=dataset, root=tmp_path / "none", global_batch=8))
    assert str(caught.value) == f"root: {tmp_path}/none is not a folder. {get}"


def test_a_global_batch_larger_than_the_set(tmp_path: Path) -> None:
    write_fashion(tmp_path)
    check_files(DataConfig(dataset="fashion_mnist", root=tmp_path, global_batch=24))
    with pytest.raises(DataError) as caught:
        check_files(DataConfig(dataset="fashion_mnist", root=tmp_path, global_batch=25))
    assert str(caught.value) == f"global_batch: expected at most the 24 training samples of {tmp_path}, found 25"

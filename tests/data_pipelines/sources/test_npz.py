"""Arrays of one's own: the names that are taken, what the config learns of them, and mistakes."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from pydantic import ValidationError

from data_pipelines import DataConfig, DataError, check_files, open_pipeline, open_validation
from data_pipelines.sources import npz
from tests.data_pipelines import cutting

_CPU = torch.device("cpu")


def _arrays(size: int, *shape: int, seed: int = 0) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(seed)
    labels = np.arange(size, dtype=np.uint8) % 3
    return {"images": rng.integers(0, 256, (size, *shape), np.uint8), "labels": labels}


def _whole(path: Path, *shape: int) -> tuple[dict[str, np.ndarray], dict[str, np.ndarray]]:
    train, val = _arrays(24, *shape), _arrays(10, *shape, seed=1)
    np.savez(path, x_train=train["images"], y_train=train["labels"], x_test=val["images"], y_test=val["labels"])
    return train, val


def _config(root: Path, **options: Any) -> DataConfig:
    return DataConfig(dataset="npz", root=root, global_batch=6, augmentation={"padding": 2}, **options)


def test_batches(tmp_path: Path) -> None:
    train, val = _whole(tmp_path / "a.npz", 12, 12, 3)
    config = _config(tmp_path / "a.npz")
    assert (config.side, config.channels, config.num_classes) == (12, 3, None)
    pixels = train["images"].astype(np.float64) / 255
    assert config.mean == [round(x, 4) for x in pixels.mean((0, 1, 2))]
    assert config.std == [round(x, 4) for x in pixels.std((0, 1, 2))]
    again = DataConfig(**config.model_dump(mode="json"))
    assert again == config
    sizes = check_files(config)
    assert (sizes.train, sizes.eval, sizes.classes) == (24, 10, 3)

    pipeline = open_pipeline(config, 5, _CPU)
    assert pipeline.class_names == ("0", "1", "2")
    cutting.assert_a_batch_is_as_promised(pipeline, train["labels"].astype(np.int64))
    cutting.assert_rows_do_not_depend_on_the_cut(pipeline)
    cutting.assert_an_epoch_can_begin_anywhere(pipeline)
    cutting.assert_each_validation_row_comes_once(pipeline)
    (shown,) = pipeline.evaluate(0, 1, 10)
    mean, std = torch.tensor(config.mean)[:, None, None], torch.tensor(config.std)[:, None, None]
    back = ((shown.images * std + mean) * 255).round().permute(0, 2, 3, 1)
    assert torch.equal(back.to(torch.uint8), torch.from_numpy(val["images"]))


@pytest.mark.parametrize(
    "names", [("train_images", "train_labels", "val_images", "val_labels"), ("x_train", "y_train")]
)
def test_names_and_places(tmp_path: Path, names: tuple[str, ...]) -> None:
    """MedMNIST's, whose labels are [N, 1]; and a file for each split, with names for the classes."""
    train, val = _arrays(24, 8, 8), _arrays(10, 8, 8, seed=1)
    options: dict[str, Any] = {}
    first = {names[0]: train["images"], names[1]: train["labels"][:, None], "classes": np.array(["a", "b", "c", "d"])}
    if len(names) == 4:
        first |= {names[2]: val["images"], names[3]: val["labels"][:, None]}
    else:
        np.savez(tmp_path / "val.npz", **val)
        options = {"val_root": tmp_path / "val.npz"}
    np.savez_compressed(tmp_path / "one.npz", **first)
    config = _config(tmp_path / "one.npz", **options)
    pipeline = open_pipeline(config, 5, _CPU)
    assert (pipeline.train_size, pipeline.eval_size, pipeline.class_names) == (24, 10, ("a", "b", "c", "d"))
    assert pipeline.channels == 1


def test_a_folder_and_validation_alone(tmp_path: Path) -> None:
    np.savez(tmp_path / "train.npz", **_arrays(24, 8, 8))
    np.savez(tmp_path / "val.npz", **_arrays(10, 8, 8, seed=1))
    config = _config(tmp_path)
    assert open_pipeline(config, 5, _CPU).eval_size == 10
    (tmp_path / "train.npz").unlink()
    alone, _ = open_validation(config, ["0", "1", "2"], _CPU)
    assert sum(len(batch.ids) for batch in alone.evaluate(0, 1, 4)) == 10
    with pytest.raises(DataError, match=r"^root: .*train.npz: no such file\. npz wants images"):
        check_files(config)


@pytest.mark.parametrize(
    ("arrays", "message"),
    [
        ({"x_train": np.zeros((3, 8, 9), np.uint8)}, r"x_train: expected square images, .* found uint8 \(3, 8, 9\)"),
        ({"x_train": np.zeros((3, 8, 8), np.float32)}, r"expected square images, uint8 .* found float32 \(3, 8, 8\)"),
        ({"x_train": np.zeros((3, 8, 8, 4), np.uint8)}, r"expected 1 or 3 channels, found 4"),
        ({"y_train": np.array(["a"] * 24)}, r"y_train: expected a class for each of 24 images, found <U1 \(24,\)"),
        ({"y_train": np.zeros(23, np.int64)}, r"expected a class for each of 24 images, found int64 \(23,\)"),
        ({"y_test": np.full(10, -1)}, r"y_test: expected classes from 0 on, found -1"),
        (
            {"x_test": np.zeros((10, 9, 9), np.uint8)},
            r"x_test: expected images of 8 pixels and 1 channels, found 9",
        ),
        ({"x_test": None}, r"expected images and labels for val, found x_train, y_test, y_train\. npz wants"),
        (
            {"y_train": np.array([{}] * 24, object)},
            r"expected a whole \.npz file, found a damaged one: Object arrays",
        ),
    ],
)
def test_mistakes(tmp_path: Path, arrays: dict[str, Any], message: str) -> None:
    train, val = _arrays(24, 8, 8), _arrays(10, 8, 8)
    whole: dict[str, Any] = {"x_train": train["images"], "y_train": train["labels"]}
    whole |= {"x_test": val["images"], "y_test": val["labels"]} | arrays
    np.savez(tmp_path / "a.npz", **{name: array for name, array in whole.items() if array is not None})

    def start() -> None:
        config = _config(tmp_path / "a.npz")
        check_files(config)
        npz.read(config.folder, None, config.side, config.channels)

    with pytest.raises((DataError, ValidationError), match=message):
        start()


def test_a_file_that_is_cut_short(tmp_path: Path) -> None:
    _whole(tmp_path / "a.npz", 8, 8)
    (tmp_path / "a.npz").write_bytes((tmp_path / "a.npz").read_bytes()[:-200])
    with pytest.raises(ValidationError, match=r"a\.npz: expected a whole \.npz file, found a damaged one"):
        _config(tmp_path / "a.npz")

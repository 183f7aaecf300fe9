"""A wrong config is refused with the key, the value and what was expected."""

from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError

from data_pipelines import DataConfig


def _message(**values: Any) -> str:
    with pytest.raises(ValidationError) as caught:
        DataConfig(**values)
    (error,) = caught.value.errors()
    where = "".join(f"{key}: " for key in error["loc"])
    return where + error["msg"]


_SUBSET = {"dataset": "fashion_mnist_subset", "global_batch": 8}
_FOLDER = {"dataset": "image_folder", "root": "/data", "global_batch": 8}


@pytest.mark.parametrize(
    ("values", "message"),
    [
        (_SUBSET | {"batch": 1}, "batch: Extra inputs are not permitted"),
        (_SUBSET | {"global_batch": "8"}, "global_batch: Input should be a valid integer"),
        (_SUBSET | {"global_batch": 0}, "global_batch: Input should be greater than or equal to 1"),
        (
            _SUBSET | {"root": "/data"},
            "Value error, root: '/data' has no meaning for fashion_mnist_subset, which comes with the package",
        ),
        ({"dataset": "cifar10", "global_batch": 8}, "Value error, root: expected the folder of cifar10, found none"),
        (
            _SUBSET | {"threads": 4},
            "Value error, threads: 4 has no meaning for dataset fashion_mnist_subset; it belongs to image_folder",
        ),
        (
            _FOLDER | {"padding": 4},
            "Value error, padding: 4 has no meaning for dataset image_folder; "
            "it belongs to the data sets of 28 and 32 pixels",
        ),
        (
            _SUBSET | {"mean": [0.5] * 3},
            "Value error, mean: expected 1 values for fashion_mnist_subset, found [0.5, 0.5, 0.5]",
        ),
        (_FOLDER | {"std": [0.2, 0.0, 0.2]}, "Value error, std: expected values above 0, found [0.2, 0.0, 0.2]"),
        (_SUBSET | {"padding": 28}, "Value error, padding: expected less than the image's 28 pixels, found 28"),
        (_FOLDER | {"image_size": 288}, "Value error, resize: expected at least image_size 288, found 256"),
        (
            _FOLDER | {"crop_area": [0.5, 1.5]},
            "Value error, crop_area: expected 0 < least <= greatest <= 1, found [0.5, 1.5]",
        ),
        (
            _FOLDER | {"crop_ratio": [2.0, 1.0]},
            "Value error, crop_ratio: expected 0 < least <= greatest, found [2.0, 1.0]",
        ),
        (
            _FOLDER | {"images_per_class": 2},
            "Value error, images_per_class: 2 has no meaning for sampler shuffle; "
            "it belongs to class_balanced and class_tuples",
        ),
        (
            _SUBSET | {"sampler": "class_balanced", "images_per_class": 1},
            "images_per_class: Input should be greater than or equal to 2",
        ),
        (
            _SUBSET | {"sampler": "class_tuples", "images_per_class": 3},
            "Value error, global_batch: expected a multiple of images_per_class = 3 for sampler class_tuples, found 8; "
            "nearest: 6 or 9",
        ),
        (
            _SUBSET | {"sampler": "class_tuples", "images_per_class": 9},
            "Value error, global_batch: expected a multiple of images_per_class = 9 for sampler class_tuples, found 8; "
            "nearest: 9",
        ),
        (_SUBSET | {"sampler": "class"}, "sampler: Input should be 'shuffle', 'class_balanced' or 'class_tuples'"),
        (_FOLDER | {"decoder": "gpu"}, "decoder: Input should be 'auto', 'cpu' or 'mixed'"),
    ],
)
def test_refused(values: dict[str, Any], message: str) -> None:
    assert _message(**values) == message


def test_yaml_values() -> None:
    config = DataConfig(**_FOLDER, crop_area=[0.25, 1], mean=[0.5, 0.5, 0.5])
    assert config.root == Path("/data")
    assert config.crop_area == (0.25, 1.0)
    assert config.image_size == config.side == 224
    assert DataConfig(dataset="cifar10", root="~/x", global_batch=1).folder == Path.home() / "x"


def test_a_config_survives_json() -> None:
    config = DataConfig(**_FOLDER, crop_area=[0.25, 1])
    assert DataConfig(**config.model_dump(mode="json", exclude_unset=True)) == config
    for sampler in ("shuffle", "class_balanced", "class_tuples"):
        config = DataConfig(**_SUBSET, sampler=sampler)
        written = config.model_dump(mode="json")
        assert ("images_per_class" in written) == (sampler != "shuffle")
        assert DataConfig(**written) == config


def test_every_field_is_described() -> None:
    assert all(field.description for field in DataConfig.model_fields.values())

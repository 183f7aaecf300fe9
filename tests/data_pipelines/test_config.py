"""A wrong config is refused with the key, the value and what was expected."""

from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError

from data_pipelines.augmentation.sections import ColorJitterConfig, ErasingConfig, MixingConfig, PolicyConfig
from data_pipelines.config import (
    MOVED,
    AugmentationConfig,
    DataConfig,
    DecodingConfig,
    ImageConfig,
    with_moved_keys,
)


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
            _SUBSET | {"decoding": {"threads": 4}},
            "Value error, decoding.threads: 4 has no meaning for dataset fashion_mnist_subset; "
            "it belongs to image_folder, webdataset and hub",
        ),
        (
            _FOLDER | {"augmentation": {"padding": 4}},
            "Value error, augmentation.padding: 4 has no meaning for dataset image_folder; "
            "it belongs to the data sets of 28 and 32 pixels, and npz",
        ),
        (
            _SUBSET | {"mean": [0.5] * 3},
            "Value error, mean: expected 1 values for fashion_mnist_subset, found [0.5, 0.5, 0.5]",
        ),
        (_FOLDER | {"std": [0.2, 0.0, 0.2]}, "Value error, std: expected values above 0, found [0.2, 0.0, 0.2]"),
        (
            _SUBSET | {"image": {"size": 300}},
            "Value error, image.size: 300 has no meaning for dataset fashion_mnist_subset; "
            "it belongs to image_folder, webdataset and hub",
        ),
        (
            _SUBSET | {"augmentation": {"flip": True, "crop_area": [0.5, 1.0]}},
            "Value error, augmentation.crop_area: (0.5, 1.0) has no meaning for dataset fashion_mnist_subset; "
            "it belongs to image_folder, webdataset and hub",
        ),
        (
            _SUBSET | {"augmentation": {"padding": 28}},
            "Value error, augmentation.padding: expected less than the image's 28 pixels, found 28",
        ),
        (
            _FOLDER | {"image": {"size": 288}},
            "Value error, image.resize: expected at least image.size = 288, found 256",
        ),
        (
            _FOLDER | {"augmentation": {"crop_area": [0.5, 1.5]}},
            "Value error, augmentation.crop_area: expected 0 < least <= greatest <= 1, found [0.5, 1.5]",
        ),
        (
            _FOLDER | {"augmentation": {"crop_ratio": [2.0, 1.0]}},
            "Value error, augmentation.crop_ratio: expected 0 < least <= greatest, found [2.0, 1.0]",
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
        (
            _FOLDER | {"decoding": {"decoder": "gpu"}},
            "decoding: decoder: Input should be 'auto', 'cpu', 'mixed' or 'torchvision'",
        ),
        (
            _SUBSET | {"augmentation": {"mixing": {"cutmix_alpha": 1.0}}, "global_batch": 7},
            "Value error, global_batch: expected a multiple of 2 where images are mixed, found 7; nearest: 6 or 8",
        ),
        (
            _SUBSET | {"augmentation": {"mixing": {"mixup_alpha": 0.2}}, "sampler": "class_tuples", "global_batch": 6},
            "Value error, global_batch: expected a multiple of twice images_per_class = 2 for sampler class_tuples "
            "where images are mixed, found 6; nearest: 4 or 8",
        ),
        (
            _SUBSET | {"repeats": 3},
            "Value error, repeats: expected a divisor of global_batch = 8, found 3",
        ),
        (
            _SUBSET | {"repeats": 8, "augmentation": {"mixing": {"mixup_alpha": 0.2}}},
            "Value error, repeats: 8 of one image in a batch leave nothing to mix it with",
        ),
        (
            _FOLDER | {"repeats": 2, "sampler": "class_tuples"},
            "Value error, repeats: 2 has no meaning for sampler class_tuples; it belongs to shuffle",
        ),
        (
            _FOLDER | {"image": {"training_sizes": [[3, 128], [1, 224]]}},
            "Value error, image.training_sizes: expected [epoch, size] pairs, epochs ascending from 0 and sizes of at "
            "least 1, found [[3, 128], [1, 224]]",
        ),
        (
            _FOLDER | {"image": {"size": 6}, "augmentation": {"gaussian_blur_prob": 0.5}},
            "Value error, augmentation: a blur needs images of more than 6 pixels, found 6",
        ),
        (
            _SUBSET | {"augmentation": {"policy": {"name": "rand_augment", "magnitude": 31.0}}},
            "augmentation: policy: Value error, magnitude: expected one of the bins 0 to 30 for rand_augment, found 31",
        ),
        (
            _SUBSET | {"augmentation": {"erasing": {"ratio": [2.0, 1.0]}}},
            "augmentation: erasing: Value error, ratio: expected 0 < least <= greatest, found [2.0, 1.0]",
        ),
    ],
)
def test_refused(values: dict[str, Any], message: str) -> None:
    assert _message(**values) == message


def test_yaml_values() -> None:
    config = DataConfig(**_FOLDER, augmentation={"crop_area": [0.25, 1]}, mean=[0.5, 0.5, 0.5])
    assert config.root == Path("/data")
    assert config.augmentation.crop_area == (0.25, 1.0)
    assert config.image.size == config.side == 224
    assert DataConfig(dataset="cifar10", root="~/x", global_batch=1).folder == Path.home() / "x"


def test_a_config_survives_json() -> None:
    config = DataConfig(**_FOLDER, augmentation={"crop_area": [0.25, 1]})
    assert DataConfig(**config.model_dump(mode="json", exclude_unset=True)) == config
    for sampler in ("shuffle", "class_balanced", "class_tuples"):
        config = DataConfig(**_SUBSET, sampler=sampler)
        written = config.model_dump(mode="json")
        assert ("images_per_class" in written) == (sampler != "shuffle")
        assert DataConfig(**written) == config


def test_what_is_written_says_nothing_without_meaning() -> None:
    written = DataConfig(**_SUBSET, augmentation={"padding": 2}).model_dump(mode="json")
    assert written["augmentation"] == {"padding": 2, "padding_mode": "reflect", "flip": True}
    assert not {"image", "decoding"} & set(written)
    written = DataConfig(**_FOLDER).model_dump(mode="json")
    assert written["augmentation"] == {"crop_area": [0.08, 1.0], "crop_ratio": [3 / 4, 4 / 3]}
    assert written["image"] == {"size": 224, "resize": 256}
    assert written["decoding"] == {"decoder": "auto", "threads": 4}


_SECTIONS = {
    "policy": PolicyConfig,
    "color_jitter": ColorJitterConfig,
    "erasing": ErasingConfig,
    "mixing": MixingConfig,
}


def test_every_field_is_described() -> None:
    for section in (AugmentationConfig, DecodingConfig, ImageConfig, *_SECTIONS.values()):
        assert all(field.description for name, field in section.model_fields.items() if name not in _SECTIONS)
    sections = {"augmentation", "decoding", "image"}
    assert all(field.description for name, field in DataConfig.model_fields.items() if name not in sections)


def test_what_does_nothing_is_not_written() -> None:
    """A run of a version that had no such keys is still the same run."""
    config = DataConfig(**_FOLDER, repeats=1, image={"training_sizes": []}, augmentation={"label_smoothing": 0.0})
    assert config.model_dump(mode="json") == DataConfig(**_FOLDER).model_dump(mode="json")
    used = DataConfig(
        **_FOLDER,
        repeats=2,
        image={"training_sizes": [[0, 128], [5, 224]]},
        augmentation={"label_smoothing": 0.1, "policy": {"name": "rand_augment"}, "off_epoch": 7},
    )
    written = used.model_dump(mode="json")
    assert set(written["augmentation"]) == {"policy", "off_epoch", "label_smoothing", "crop_area", "crop_ratio"}
    assert DataConfig(**written) == used
    assert [used.training_side(epoch) for epoch in (0, 4, 5, 9)] == [128, 128, 224, 224]


# --- keys that stood elsewhere ---

# As they were written before there were sections.
_OF_A_FOLDER = {
    "image_size": 160,
    "resize": 182,
    "crop_area": [0.25, 1.0],
    "crop_ratio": [0.5, 2.0],
    "decoder": "cpu",
    "threads": 8,
}
_OF_A_SMALL_SET = {"padding": 2, "padding_mode": "zeros", "flip": False}


def test_what_was_written_without_sections_is_read() -> None:
    config = DataConfig(**with_moved_keys(_FOLDER | _OF_A_FOLDER))
    assert (config.image.size, config.image.resize) == (160, 182)
    assert (config.augmentation.crop_area, config.augmentation.crop_ratio) == ((0.25, 1.0), (0.5, 2.0))
    assert (config.decoding.decoder, config.decoding.threads) == ("cpu", 8)
    config = DataConfig(**with_moved_keys(_SUBSET | _OF_A_SMALL_SET))
    assert config.augmentation.model_dump(include=set(_OF_A_SMALL_SET)) == _OF_A_SMALL_SET
    assert {*_OF_A_FOLDER, *_OF_A_SMALL_SET} == set(MOVED)


def test_what_is_written_today_is_read_as_it_is() -> None:
    written = DataConfig(**_FOLDER, image={"size": 100}).model_dump(mode="json")
    assert with_moved_keys(written) == written


def test_an_old_key_never_hides_a_new_one() -> None:
    moved = with_moved_keys({"threads": 3, "decoding": {"threads": 5}, "padding": 1, "augmentation": None})
    assert moved == {"decoding": {"threads": 5}, "padding": 1, "augmentation": None}

"""What a run says about its data."""

from collections.abc import Mapping
from functools import reduce
from typing import Annotated, Any, Literal

from pydantic import (
    BaseModel,
    Field,
    SerializerFunctionWrapHandler,
    Strict,
    model_serializer,
    model_validator,
)

from data_pipelines.augmentation.sections import Augmentations
from data_pipelines.augmentation.spatial import BLUR
from data_pipelines.keys import AnyPath, Only, Section
from data_pipelines.sources.sections import OF_PHOTOS, OF_SMALL_SETS, SourceConfig

MOVED = {
    "padding": ("augmentation", "padding"),
    "padding_mode": ("augmentation", "padding_mode"),
    "flip": ("augmentation", "flip"),
    "crop_area": ("augmentation", "crop_area"),
    "crop_ratio": ("augmentation", "crop_ratio"),
    "image_size": ("image", "size"),
    "resize": ("image", "resize"),
    "decoder": ("decoding", "decoder"),
    "threads": ("decoding", "threads"),
}
"""Keys that stood at the top of `data:` once, and the section and name that they have now."""


def with_moved_keys(data: Mapping[str, Any]) -> dict[str, Any]:
    """A `data:` section that an earlier version wrote, as this one writes it; one of this version comes back equal."""
    renewed = dict(data)
    for key, (section, name) in MOVED.items():
        inside = renewed.get(section, {})
        if key in renewed and isinstance(inside, dict):
            renewed[section] = {name: renewed.pop(key), **inside}
    return renewed


_SHUFFLE = Only("sampler", ("shuffle",), "shuffle")
_TUPLES = Only("sampler", ("class_balanced", "class_tuples"), "class_balanced and class_tuples")

# YAML has no tuples: these are read from lists, all else must have its own type.
_Range = Annotated[tuple[float, float], Strict(False)]
_Stage = Annotated[tuple[int, int], Strict(False)]

_LATER_KEYS = (
    "val_root",
    "val_labels",
    "classes",
    "links",
    "cache",
    "label_column",
    "fraction",
    "class_weights",
    "shape",
    "scale_to",
    "shared_decode",
    "repeats",
    "on_error",
    "max_bad",
    "image.training_sizes",
    "image.interpolation",
    "image.eval_interpolation",
    "image.of_networks",
    "augmentation.erasing.max_count",
    *(f"augmentation.{name}" for name in Augmentations.model_fields),
)
"""Keys that earlier versions did not have: where they have their defaults they are not written, so that a run of such a
version is still the same run."""


class ImageConfig(Section):
    """The images that a network sees, where files have images of all sizes."""

    size: Annotated[int, OF_PHOTOS] = Field(
        default=224, ge=1, description="Side of the images a network sees, in pixels (photos)."
    )
    resize: Annotated[int, OF_PHOTOS] = Field(
        default=256, ge=1, description="Shorter side before the validation crop, in pixels (photos)."
    )
    interpolation: Annotated[Literal["bilinear", "bicubic"], OF_PHOTOS] = Field(
        default="bilinear", description="How photos are scaled, always with antialiasing (photos)."
    )
    eval_interpolation: Annotated[Literal["bilinear", "bicubic"] | None, OF_PHOTOS] = Field(
        default=None, description="Likewise for validation; null: as interpolation (photos)."
    )
    of_networks: Annotated[bool, OF_PHOTOS] = Field(
        default=False,
        description="Whether size, resize, eval_interpolation, mean and std are those that timm's pretrained_cfg or "
        "torchvision's weights state for the networks, in the place of what is said here; the run's config.yaml "
        "then has the numbers (photos).",
    )
    training_sizes: Annotated[tuple[_Stage, ...], Strict(False), OF_PHOTOS] = Field(
        default=(),
        description="[epoch, size] pairs: from which epoch on, counted from 0, training images have another size, such "
        "as [[0, 128], [30, 176], [60, 224]]; [] for image.size all along (photos).",
    )

    @property
    def for_validation(self) -> str:
        """How photos are scaled for validation."""
        return self.eval_interpolation or self.interpolation


class AugmentationConfig(Augmentations):
    """How training images are changed, each time anew."""

    padding: Annotated[int, OF_SMALL_SETS] = Field(
        default=4, ge=0, description="Pixels added on each side before the random crop (28, 32 px sets)."
    )
    padding_mode: Annotated[Literal["reflect", "zeros"], OF_SMALL_SETS] = Field(
        default="reflect", description="What the added pixels show: the mirrored image, or black (28, 32 px sets)."
    )
    flip: Annotated[bool, OF_SMALL_SETS] = Field(
        default=True, description="Whether every second image is mirrored, by chance (28, 32 px sets)."
    )
    crop_area: Annotated[_Range, OF_PHOTOS] = Field(
        default=(0.08, 1.0),
        description="Least and greatest area of a training crop, as a part of the image (photos).",
    )
    crop_ratio: Annotated[_Range, OF_PHOTOS] = Field(
        default=(3 / 4, 4 / 3), description="Least and greatest width / height of a training crop (photos)."
    )


class DecodingConfig(Section):
    """What turns files into pixels; a run that changes it goes on as the same run."""

    decoder: Annotated[Literal["auto", "cpu", "mixed", "torchvision"], OF_PHOTOS] = Field(
        default="auto",
        description="What decodes JPEGs: cpu and mixed (partly on the GPU) are DALI; auto is mixed on CUDA where "
        "DALI is installed, and torchvision elsewhere (photos).",
    )
    threads: Annotated[int, OF_PHOTOS] = Field(default=4, ge=1, description="Decoding threads of a rank (photos).")


class DataConfig(SourceConfig):
    """Which data set, where it is, and how its images are drawn, decoded and augmented."""

    global_batch: int = Field(ge=1, description="Samples of one optimiser step, over all ranks.")
    sampler: Literal["shuffle", "class_balanced", "class_tuples"] = Field(
        default="shuffle",
        description="How batches are drawn. shuffle: from a permutation of all images; class_balanced: each batch on "
        "its own, images_per_class images of each of global_batch / images_per_class classes, so that an epoch shows "
        "some images several times and others never; class_tuples: such batches, but each image once an epoch.",
    )
    images_per_class: Annotated[int, _TUPLES] = Field(
        default=2,
        ge=2,
        description="Images of one class that lie side by side in a batch (class_balanced, class_tuples).",
    )
    repeats: Annotated[int, _SHUFFLE] = Field(
        default=1,
        ge=1,
        description="Augmentations of an image in one batch (repeated augmentation): an epoch has as many batches as "
        "ever, of 1 / repeats of the images (shuffle).",
    )
    on_error: Annotated[Literal["replace", "raise"], OF_PHOTOS] = Field(
        default="replace",
        description="What a file that cannot be read does. replace: the next of its class is shown instead, it counts "
        "as wrong in validation, and is named in damaged.json; raise: it ends the run (photos).",
    )
    max_bad: Annotated[float, OF_PHOTOS] = Field(
        default=0.01,
        ge=0,
        le=1,
        description="Part of a split's files that may be unreadable before the run ends; one always may, unless this "
        "is 0 (photos).",
    )
    views: Literal["shared", "per_peer"] = Field(
        default="shared", description="Whether all peers see one augmentation of an image, or each peer its own."
    )
    held_out: float = Field(
        default=0.0,
        ge=0,
        lt=1,
        description="Part of the training samples that is never trained on, for methods that look at such samples.",
    )
    fraction: float = Field(
        default=1.0,
        gt=0,
        le=1,
        description="Part of the training images of each class that is used, at least one; which, the seed says, and a "
        "smaller part lies within a larger one.",
    )
    class_weights: Literal["balanced"] | list[float] | AnyPath | None = Field(
        default=None,
        description="How much an image counts in the loss by its class, scaled to a mean of 1 over the training "
        "images: balanced (as the inverse of the number of images), a list in the order of the classes, or a file with "
        "a line CLASS WEIGHT for each; null: all alike.",
    )
    image: ImageConfig = ImageConfig()
    augmentation: AugmentationConfig = AugmentationConfig()
    decoding: DecodingConfig = DecodingConfig()

    @model_validator(mode="after")
    def _cross_check(self) -> "DataConfig":
        for path, only in self._without_meaning():
            section = reduce(getattr, path[:-1], self)
            if path[-1] in section.model_fields_set:
                raise ValueError(
                    f"{'.'.join(path)}: {getattr(section, path[-1])!r} has no meaning for {only.key} "
                    f"{getattr(self, only.key)}; it belongs to {only.owner}"
                )
        if self.global_batch % self.tuple_size:
            below = self.global_batch // self.tuple_size * self.tuple_size
            nearest = " or ".join(str(batch) for batch in (below, below + self.tuple_size) if batch)
            raise ValueError(
                f"global_batch: expected a multiple of {_tuple_of(self)}, found {self.global_batch}; nearest: {nearest}"
            )
        if self.global_batch % self.repeats:
            raise ValueError(f"repeats: expected a divisor of global_batch = {self.global_batch}, found {self.repeats}")
        if self.dataset == "fashion_mnist_subset":
            if self.root is not None:
                raise ValueError(
                    f"root: {str(self.root)!r} has no meaning for fashion_mnist_subset, which comes with the package"
                )
        elif self.root is None:
            raise ValueError(f"root: expected the folder of {self.dataset}, found none")
        self._check_constants()
        self._check_augmentation()
        if self.photos:
            self._check_crops()
        elif self.augmentation.padding >= self.side:
            raise ValueError(
                f"augmentation.padding: expected less than the image's {self.side} pixels, found "
                f"{self.augmentation.padding}"
            )
        return self

    def _check_constants(self) -> None:
        for key, values in (("mean", self.mean), ("std", self.std)):
            if values is not None and len(values) != self.channels:
                raise ValueError(f"{key}: expected {self.channels} values for {self.dataset}, found {values}")
        if self.std is not None and min(self.std) <= 0:
            raise ValueError(f"std: expected values above 0, found {self.std}")

    def _check_augmentation(self) -> None:
        sides = [self.side, *(size for _, size in self.image.training_sizes)]
        if self.augmentation.blurs and min(sides) <= BLUR:
            raise ValueError(f"augmentation: a blur needs images of more than {BLUR} pixels, found {min(sides)}")
        if self.augmentation.mixing.on and self.repeats == self.global_batch:
            raise ValueError(f"repeats: {self.repeats} of one image in a batch leave nothing to mix it with")

    def _check_crops(self) -> None:
        image, augmentation = self.image, self.augmentation
        epochs = [epoch for epoch, _ in image.training_sizes]
        if epochs != sorted(set(epochs)) or any(epoch < 0 or size < 1 for epoch, size in image.training_sizes):
            raise ValueError(
                "image.training_sizes: expected [epoch, size] pairs, epochs ascending from 0 and sizes of at least 1, "
                f"found {[list(pair) for pair in image.training_sizes]}"
            )
        if image.resize < image.size:
            raise ValueError(f"image.resize: expected at least image.size = {image.size}, found {image.resize}")
        for key, (low, high), limit in (
            ("crop_area", augmentation.crop_area, 1),
            ("crop_ratio", augmentation.crop_ratio, float("inf")),
        ):
            if not 0 < low <= high <= limit:
                bound = " <= 1" if limit == 1 else ""
                raise ValueError(f"augmentation.{key}: expected 0 < least <= greatest{bound}, found {[low, high]}")

    def _without_meaning(self) -> list[tuple[tuple[str, ...], Only]]:
        """Paths of the keys that mean nothing for this data set and sampler, sorted, and whose they are."""
        return [(path, only) for path, only in _conditional(DataConfig) if getattr(self, only.key) not in only.values]

    @model_serializer(mode="wrap")
    def _what_has_a_meaning(self, serialise: SerializerFunctionWrapHandler) -> dict[str, Any]:
        # What is written can be read again, and says nothing that has no meaning for this run.
        written = serialise(self)
        for path, _ in self._without_meaning():
            reduce(lambda section, name: section.get(name, {}), path[:-1], written).pop(path[-1], None)
        for key in _LATER_KEYS:
            *above, name = key.split(".")
            section: Any = reduce(getattr, above, self)
            if getattr(section, name) == type(section).model_fields[name].default:
                reduce(lambda inner, part: inner.get(part, {}), above, written).pop(name, None)
        return {key: value for key, value in written.items() if value != {}}

    def held_out_of(self, size: int) -> int:
        """The number of training samples that are held out of `size`."""
        return int(self.held_out * size)

    @property
    def tuple_size(self) -> int:
        """Neighbouring rows of a batch that no placement parts: images of one class, two such groups where images are
        mixed; or a row alone."""
        return self.neighbours * (2 if self.augmentation.mixing.on else 1)

    @property
    def neighbours(self) -> int:
        """Images of one class that lie side by side in a batch."""
        return 1 if self.sampler == "shuffle" else self.images_per_class

    @property
    def tuples(self) -> int:
        """Groups of neighbours in a global batch."""
        return self.global_batch // self.neighbours

    def training_side(self, epoch: int) -> int:
        """Side of the training images of an epoch, in pixels."""
        begun = [size for first, size in self.image.training_sizes if first <= epoch]
        return begun[-1] if begun else self.side

    @property
    def side(self) -> int:
        """Side of the images a network sees, in pixels."""
        return self.image.size if self.photos else self.scale_to or self.small[0]


def _conditional(model: type[BaseModel]) -> list[tuple[tuple[str, ...], Only]]:
    """Path of each key that does not belong to all, sorted, and whose it is."""
    found: list[tuple[tuple[str, ...], Only]] = []
    for name, field in model.model_fields.items():
        found += [((name,), only) for only in field.metadata if isinstance(only, Only)]
        if isinstance(field.annotation, type) and issubclass(field.annotation, BaseModel):
            found += [((name, *path), only) for path, only in _conditional(field.annotation)]
    return sorted(found, key=lambda each: each[0])


def _tuple_of(config: DataConfig) -> str:
    """What `tuple_size` comes from, for a message."""
    of_class = f"images_per_class = {config.images_per_class} for sampler {config.sampler}"
    if not config.augmentation.mixing.on:
        return of_class
    return "2 where images are mixed" if config.sampler == "shuffle" else f"twice {of_class} where images are mixed"

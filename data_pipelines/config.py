"""What a run says about its data."""

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    SerializerFunctionWrapHandler,
    Strict,
    model_serializer,
    model_validator,
)

from data_pipelines.sources.standard_sets import STANDARD, Standard

_RESIDENT_ONLY = {"padding", "padding_mode", "flip"}
_FOLDER_ONLY = {"image_size", "resize", "crop_area", "crop_ratio", "decoder", "threads"}
_TUPLES_ONLY = {"images_per_class"}
# The constants of torchvision and timm.
_IMAGENET = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
_SUBSET = Path(__file__).parent / "fashion_mnist_subset"

# YAML has neither paths nor tuples: these two are read from strings and lists, all else must have its own type.
_Path = Annotated[Path, Strict(False)]
_Range = Annotated[tuple[float, float], Strict(False)]


class DataConfig(BaseModel):
    """Which data set, where it is, and how its images are augmented."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, allow_inf_nan=False)

    dataset: Literal["fashion_mnist_subset", "fashion_mnist", "cifar10", "cifar100", "image_folder"] = Field(
        description="The data set; fashion_mnist_subset comes with the package, image_folder is ImageNet's layout."
    )
    root: _Path | None = Field(
        default=None, description="Folder of the data set; needed for all but fashion_mnist_subset. ~ is expanded."
    )
    global_batch: int = Field(ge=1, description="Samples of one optimiser step, over all ranks.")
    sampler: Literal["shuffle", "class_balanced", "class_tuples"] = Field(
        default="shuffle",
        description="How batches are drawn. shuffle: from a permutation of all images; class_balanced: each batch on "
        "its own, images_per_class images of each of global_batch / images_per_class classes, so that an epoch shows "
        "some images several times and others never; class_tuples: such batches, but each image once an epoch.",
    )
    images_per_class: int = Field(
        default=2,
        ge=2,
        description="Images of one class that lie side by side in a batch (class_balanced, class_tuples).",
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
    mean: list[float] | None = Field(
        default=None, description="Mean of each channel, pixels in [0, 1]; null for the data set's published constants."
    )
    std: list[float] | None = Field(
        default=None,
        description="Standard deviation of each channel, like mean; null for the data set's published constants.",
    )
    padding: int = Field(
        default=4, ge=0, description="Pixels added on each side before the random crop (28, 32 px sets)."
    )
    padding_mode: Literal["reflect", "zeros"] = Field(
        default="reflect", description="What the added pixels show: the mirrored image, or black (28, 32 px sets)."
    )
    flip: bool = Field(default=True, description="Whether every second image is mirrored, by chance (28, 32 px sets).")
    image_size: int = Field(
        default=224, ge=1, description="Side of the images a network sees, in pixels (image_folder)."
    )
    resize: int = Field(
        default=256, ge=1, description="Shorter side before the validation crop, in pixels (image_folder)."
    )
    crop_area: _Range = Field(
        default=(0.08, 1.0),
        description="Least and greatest area of a training crop, as a part of the image (image_folder).",
    )
    crop_ratio: _Range = Field(
        default=(3 / 4, 4 / 3), description="Least and greatest width / height of a training crop (image_folder)."
    )
    decoder: Literal["auto", "cpu", "mixed"] = Field(
        default="auto", description="Where JPEGs are decoded; auto is mixed on CUDA, and cpu elsewhere (image_folder)."
    )
    threads: int = Field(default=4, ge=1, description="DALI's decoding threads of a rank (image_folder).")

    @model_validator(mode="after")
    def _cross_check(self) -> "DataConfig":
        folder = self.dataset == "image_folder"
        for key in sorted(self.model_fields_set & self._foreign):
            if key in _TUPLES_ONLY:
                user, owner = f"sampler {self.sampler}", "class_balanced and class_tuples"
            else:
                user = f"dataset {self.dataset}"
                owner = "the data sets of 28 and 32 pixels" if folder else "image_folder"
            raise ValueError(f"{key}: {getattr(self, key)!r} has no meaning for {user}; it belongs to {owner}")
        if self.global_batch % self.tuple_size:
            below = self.global_batch // self.tuple_size * self.tuple_size
            nearest = " or ".join(str(batch) for batch in (below, below + self.tuple_size) if batch)
            raise ValueError(
                f"global_batch: expected a multiple of images_per_class = {self.images_per_class} for sampler "
                f"{self.sampler}, found {self.global_batch}; nearest: {nearest}"
            )
        if self.dataset == "fashion_mnist_subset":
            if self.root is not None:
                raise ValueError(
                    f"root: {str(self.root)!r} has no meaning for fashion_mnist_subset, which comes with the package"
                )
        elif self.root is None:
            raise ValueError(f"root: expected the folder of {self.dataset}, found none")
        self._check_constants()
        if folder:
            self._check_crops()
        elif self.padding >= self.side:
            raise ValueError(f"padding: expected less than the image's {self.side} pixels, found {self.padding}")
        return self

    def _check_constants(self) -> None:
        for key, values in (("mean", self.mean), ("std", self.std)):
            if values is not None and len(values) != self.channels:
                raise ValueError(f"{key}: expected {self.channels} values for {self.dataset}, found {values}")
        if self.std is not None and min(self.std) <= 0:
            raise ValueError(f"std: expected values above 0, found {self.std}")

    def _check_crops(self) -> None:
        if self.resize < self.image_size:
            raise ValueError(f"resize: expected at least image_size {self.image_size}, found {self.resize}")
        for key, (low, high), limit in (
            ("crop_area", self.crop_area, 1),
            ("crop_ratio", self.crop_ratio, float("inf")),
        ):
            if not 0 < low <= high <= limit:
                bound = " <= 1" if limit == 1 else ""
                raise ValueError(f"{key}: expected 0 < least <= greatest{bound}, found {[low, high]}")

    @property
    def _foreign(self) -> set[str]:
        foreign = _RESIDENT_ONLY if self.dataset == "image_folder" else _FOLDER_ONLY
        return foreign | _TUPLES_ONLY if self.sampler == "shuffle" else foreign

    @model_serializer(mode="wrap")
    def _without_foreign_keys(self, serialise: SerializerFunctionWrapHandler) -> dict[str, Any]:
        # What is written can be read again, and says nothing that has no meaning for this run.
        return {key: value for key, value in serialise(self).items() if key not in self._foreign}

    @property
    def folder(self) -> Path:
        """The folder of the data set, ~ expanded; the package's own for fashion_mnist_subset."""
        return _SUBSET if self.root is None else self.root.expanduser()

    def held_out_of(self, size: int) -> int:
        """The number of training samples that are held out of `size`."""
        return int(self.held_out * size)

    @property
    def tuple_size(self) -> int:
        """Neighbouring rows of a batch that belong together: images of one class, or a row alone."""
        return 1 if self.sampler == "shuffle" else self.images_per_class

    @property
    def tuples(self) -> int:
        """Tuples of that size in a global batch."""
        return self.global_batch // self.tuple_size

    @property
    def side(self) -> int:
        """Side of the images a network sees, in pixels."""
        return self.image_size if self.dataset == "image_folder" else self._standard.side

    @property
    def normalisation(self) -> tuple[Sequence[float], Sequence[float]]:
        """Mean and standard deviation of each channel, of pixels scaled to [0, 1]."""
        mean, std = _IMAGENET if self.dataset == "image_folder" else (self._standard.mean, self._standard.std)
        return self.mean or mean, self.std or std

    @property
    def _standard(self) -> Standard:
        return STANDARD[self.dataset]

    @property
    def num_classes(self) -> int | None:
        """Classes of the data set; None for image_folder, whose folders say."""
        return None if self.dataset == "image_folder" else len(self._standard.class_names)

    @property
    def channels(self) -> int:
        """Channels of an image."""
        return 3 if self.dataset == "image_folder" else self._standard.channels

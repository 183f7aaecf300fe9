"""What a run says about where its data lie, and in which form."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field, Strict, model_validator

from data_pipelines.keys import ON_OFF, AnyPath, Only, Section
from data_pipelines.sources import npz
from data_pipelines.sources.standard_sets import STANDARD

# The constants of torchvision and timm.
_IMAGENET = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)

PHOTOS = ("image_folder", "webdataset", "hub")
"""The data sets of encoded photos of any size, which are decoded as they are shown."""

OF_PHOTOS = Only("dataset", PHOTOS, "image_folder, webdataset and hub")
OF_SMALL_SETS = Only("dataset", (*STANDARD, "npz"), "the data sets of 28 and 32 pixels, and npz")
_MOVABLE = Only("dataset", (*PHOTOS, "npz"), "image_folder, webdataset, hub and npz")
_NPZ = Only("dataset", ("npz",), "npz")
_HUB = Only("dataset", ("hub",), "hub")
_FILES = Only("dataset", ("image_folder", "webdataset"), "image_folder and webdataset")

DataSet = Literal[
    "fashion_mnist_subset",
    "fashion_mnist",
    "cifar10",
    "cifar100",
    "npz",
    "image_folder",
    "webdataset",
    "hub",
]

_SUBSET = Path(__file__).parent.parent / "fashion_mnist_subset"


@dataclass(frozen=True)
class Where:
    """Where the photos of a data set lie, ~ expanded; see `SourceConfig` for each."""

    dataset: str
    root: Path
    val_root: Path | None = None
    val_labels: Path | None = None
    classes: Path | None = None
    links: Literal["inside", "anywhere"] = "inside"
    cache: Path | None = None
    label_column: str | None = None


class SourceConfig(Section):
    """Which data set, and where it is."""

    dataset: DataSet = Field(
        description="The data set; fashion_mnist_subset comes with the package, image_folder is ImageNet's layout, "
        "webdataset tar shards, hub Arrow or Parquet files, npz arrays in NumPy's files; docs/data.md shows each."
    )
    root: AnyPath | None = Field(
        default=None, description="Folder of the data set; needed for all but fashion_mnist_subset. ~ is expanded."
    )
    val_root: Annotated[AnyPath | None, _MOVABLE] = Field(
        default=None,
        description="Another place of the validation split: VAL_ROOT/val/, or VAL_ROOT itself where there is no such "
        "folder; null: under root (photos, npz).",
    )
    val_labels: Annotated[AnyPath | None, _FILES] = Field(
        default=None,
        description="The validation images lie side by side, as ILSVRC's own, and this file says of which class each "
        "is: lines of FILE CLASS, or of the class alone in the order of the files' names (image_folder, webdataset).",
    )
    classes: Annotated[AnyPath | None, OF_PHOTOS] = Field(
        default=None,
        description="A file that lists the classes in the order of the labels, a line each, such as ImageNet's list of "
        "synsets; null: sorted by name, or as the data say (photos).",
    )
    shared_decode: Annotated[Literal["auto", "on", "off"], ON_OFF, OF_PHOTOS] = Field(
        default="auto",
        description="Whether ranks of a node that need the same rows decode a share of them each, and pass the pixels "
        "on. auto: where photos are decoded on the CPU and all peers see one augmentation (photos).",
    )
    links: Annotated[Literal["inside", "anywhere"], _FILES] = Field(
        default="inside",
        description="Where links may lead: to places inside the folder of the data set, or anywhere (image_folder, "
        "webdataset).",
    )
    label_column: Annotated[str | None, _HUB] = Field(
        default=None, description="The column of the classes; null: the only one that can be (hub)."
    )
    shape: Annotated[Annotated[tuple[int, int], Strict(False)] | None, _NPZ] = Field(
        default=None, description="Side of the images in pixels, and their channels; null: as the file says (npz)."
    )
    scale_to: Annotated[int | None, OF_SMALL_SETS] = Field(
        default=None,
        ge=1,
        description="Side in pixels to which all images are scaled once, bilinearly, with antialiasing where they "
        "shrink; null: as they are (28, 32 px sets, npz).",
    )
    cache: Annotated[AnyPath | None, OF_PHOTOS] = Field(
        default=None,
        description="A folder for what is known of the data set from one start to the next (listings, indices); null: "
        ".cohort in its own folder, or ~/.cache/cohort where that cannot be written to (photos).",
    )

    mean: list[float] | None = Field(
        default=None, description="Mean of each channel, pixels in [0, 1]; null for the data set's published constants."
    )
    std: list[float] | None = Field(
        default=None,
        description="Standard deviation of each channel, like mean; null for the data set's published constants.",
    )

    @property
    def folder(self) -> Path:
        """The folder of the data set, ~ expanded; the package's own for fashion_mnist_subset."""
        return _SUBSET if self.root is None else self.root.expanduser()

    @property
    def photos(self) -> bool:
        """Whether it is made of encoded photos, whose number of classes and sizes their files say."""
        return self.dataset in PHOTOS

    @property
    def where(self) -> Where:
        """What of this says where photos lie."""
        named = {key: getattr(self, key) for key in ("val_root", "val_labels", "classes", "cache")}
        paths = {key: path and path.expanduser() for key, path in named.items()}
        return Where(self.dataset, self.folder, links=self.links, label_column=self.label_column, **paths)

    @model_validator(mode="before")
    @classmethod
    def _as_the_file_says(cls, values: Any) -> Any:
        """What is in an array's file, and a config does not say, stands in the config from now on."""
        if (
            not isinstance(values, Mapping)
            or values.get("dataset") != "npz"
            or not isinstance(values.get("root"), str | Path)
        ):
            return values
        root, found = Path(values["root"]).expanduser(), dict(values)
        if found.get("shape") is None:
            found["shape"] = npz.described(root)
        constants = [key for key in ("mean", "std") if found.get(key) is None]
        if constants:
            found |= {key: value for key, value in npz.statistics(root).items() if key in constants}
        return found

    @property
    def normalisation(self) -> tuple[Sequence[float], Sequence[float]]:
        """Mean and standard deviation of each channel, of pixels scaled to [0, 1]."""
        standard = STANDARD.get(self.dataset)
        mean, std = (standard.mean, standard.std) if standard else _IMAGENET
        return self.mean or mean, self.std or std

    @property
    def small(self) -> tuple[int, int]:
        """Side and channels of images that are all alike, as they are on disk."""
        standard = STANDARD.get(self.dataset)
        return (standard.side, standard.channels) if standard else self.shape or (0, 0)

    @property
    def num_classes(self) -> int | None:
        """Classes of the data set; None where only its files say."""
        return len(STANDARD[self.dataset].class_names) if self.dataset in STANDARD else None

    @property
    def channels(self) -> int:
        """Channels of an image."""
        return 3 if self.photos else self.small[1]

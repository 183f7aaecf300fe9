"""What a run says about augmentation that any data set may have."""

from typing import Annotated, Literal

from pydantic import Field, Strict, model_validator

from data_pipelines.keys import Section

_Range = Annotated[tuple[float, float], Strict(False)]


class PolicyConfig(Section):
    """Operations chosen anew for each image."""

    name: Literal[
        "none",
        "rand_augment",
        "timm_rand_augment",
        "trivial_augment",
        "auto_augment_cifar10",
        "auto_augment_imagenet",
        "auto_augment_svhn",
        "three_augment",
    ] = Field(
        "none",
        description="rand_augment, trivial_augment and auto_augment_* as in torchvision; timm_rand_augment: timm's "
        "(rand-m9-mstd0.5-inc1 is magnitude 9, magnitude_std 0.5, increasing); three_augment: DeiT III's grayscale, "
        "solarisation or blur",
    )
    num_ops: int = Field(2, ge=1, le=8, description="rand_augment, timm_rand_augment: operations one after another")
    magnitude: float = Field(9.0, ge=0, description="rand_augment: one of the bins; timm_rand_augment: 0 to 10")
    num_magnitude_bins: int = Field(31, ge=2, description="rand_augment, trivial_augment: bins of magnitudes")
    magnitude_std: float = Field(
        0.0, ge=0, description="timm_rand_augment: standard deviation of an operation's magnitude, timm's mstd"
    )
    increasing: bool = Field(
        False, description="timm_rand_augment: whether all operations grow with the magnitude, timm's inc"
    )
    prob: float = Field(0.5, ge=0, le=1, description="timm_rand_augment: probability of each operation")
    interpolation: Literal["nearest", "bilinear"] = Field(
        "nearest", description="how rotated, sheared and shifted images are read; nearest is torchvision's default"
    )
    fill: int | None = Field(
        None,
        ge=0,
        le=255,
        description="what shows where a shifted image ends; null: 0, and the data set's mean for timm_rand_augment",
    )

    @model_validator(mode="after")
    def _a_bin(self) -> "PolicyConfig":
        if self.name == "rand_augment" and (self.magnitude % 1 or self.magnitude >= self.num_magnitude_bins):
            raise ValueError(
                f"magnitude: expected one of the bins 0 to {self.num_magnitude_bins - 1} for rand_augment, found "
                f"{self.magnitude:g}"
            )
        if self.name == "timm_rand_augment" and self.magnitude > 10:
            raise ValueError(f"magnitude: expected 0 to 10 for timm_rand_augment, found {self.magnitude:g}")
        return self


class ColorJitterConfig(Section):
    """torchvision's ColorJitter: four operations in random order. timm's 0.4 is 0.4 for the first three."""

    brightness: float = Field(0.0, ge=0, description="factor from 1 - b to 1 + b, at least 0")
    contrast: float = Field(0.0, ge=0, description="factor from 1 - c to 1 + c, at least 0")
    saturation: float = Field(0.0, ge=0, description="factor from 1 - s to 1 + s, at least 0")
    hue: float = Field(0.0, ge=0, le=0.5, description="turn from -h to h; half a turn is 0.5")
    prob: float = Field(1.0, ge=0, le=1, description="probability that an image is changed")

    @property
    def on(self) -> bool:
        """Whether anything is ever changed."""
        return self.prob > 0 and any((self.brightness, self.contrast, self.saturation, self.hue))


class ErasingConfig(Section):
    """timm's random erasing: rectangles of the normalised image are painted over."""

    prob: float = Field(0.0, ge=0, le=1, description="probability that an image has rectangles")
    max_count: int = Field(
        1, ge=1, le=16, description="most rectangles of an image, which share the area; from 1 on all are as likely"
    )
    mode: Literal["const", "rand", "pixel"] = Field(
        "pixel", description="const: 0, which is the mean; rand: one normal colour; pixel: normal noise"
    )
    area: _Range = Field((0.02, 1 / 3), description="least and greatest part of the image")
    ratio: _Range = Field((0.3, 1 / 0.3), description="least and greatest height / width")

    @model_validator(mode="after")
    def _ascending(self) -> "ErasingConfig":
        for key, (low, high), limit in (("area", self.area, 1), ("ratio", self.ratio, float("inf"))):
            if not 0 < low <= high <= limit:
                raise ValueError(f"{key}: expected 0 < least <= greatest{' <= 1' * (limit == 1)}, found {[low, high]}")
        return self


class MixingConfig(Section):
    """timm's Mixup: images and targets of two neighbours of a batch are mixed, the same for all peers."""

    mixup_alpha: float = Field(0.0, ge=0, description="of the Beta distribution of mixup's weight; 0: no mixup")
    cutmix_alpha: float = Field(0.0, ge=0, description="of the Beta distribution of CutMix's area; 0: no CutMix")
    prob: float = Field(1.0, ge=0, le=1, description="probability that mixing takes place")
    switch_prob: float = Field(0.5, ge=0, le=1, description="probability of CutMix where there are both")
    mode: Literal["batch", "pair", "elem"] = Field(
        "batch", description="whether one weight is drawn for a global batch, for each pair or for each image"
    )
    off_epoch: int | None = Field(
        None, ge=0, description="the epoch, from 0, from which on images are no longer mixed; null: they always are"
    )

    @property
    def on(self) -> bool:
        """Whether anything is ever mixed."""
        return self.prob > 0 and (self.mixup_alpha > 0 or self.cutmix_alpha > 0)


class Augmentations(Section):
    """How training images are changed after they were cropped and flipped."""

    policy: PolicyConfig = PolicyConfig()
    color_jitter: ColorJitterConfig = ColorJitterConfig()
    grayscale_prob: float = Field(0.0, ge=0, le=1, description="Probability that an image loses its colours.")
    solarize_prob: float = Field(0.0, ge=0, le=1, description="Probability that all pixels from 128 on are inverted.")
    gaussian_blur_prob: float = Field(
        0.0, ge=0, le=1, description="Probability of a Gaussian blur with a sigma of 0.1 to 2 pixels."
    )
    cutout: int = Field(
        0, ge=0, description="Side of a square that is set to the mean, its centre anywhere, in pixels; 0: none."
    )
    erasing: ErasingConfig = ErasingConfig()
    off_epoch: int | None = Field(
        default=None,
        ge=0,
        description="The epoch, from 0, from which on images are only cropped and flipped (mixing has a key of its "
        "own); null: never.",
    )
    mixing: MixingConfig = MixingConfig()
    label_smoothing: float = Field(
        0.0, ge=0, lt=1, description="Part of each target that is spread evenly over all classes."
    )

    @property
    def soft_targets(self) -> bool:
        """Whether targets are probabilities [N, C] rather than class indices [N]."""
        return self.mixing.on or self.label_smoothing > 0

    @property
    def blurs(self) -> bool:
        """Whether an image is ever blurred."""
        return self.gaussian_blur_prob > 0 or self.policy.name == "three_augment"

"""Which operations an image gets, and how strong: the policies of torchvision and timm, from uniform numbers."""

from collections.abc import Callable, Sequence
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

from data_pipelines.augmentation.layers import Layer, Wish, layer
from data_pipelines.augmentation.sections import ColorJitterConfig, PolicyConfig
from data_pipelines.order import Rows

Numbers = NDArray[np.float64]

# Of each operation of a policy: which, whether, how strong (two numbers), and with which sign.
_CHOICE, _WHETHER, _STRENGTH, _SECOND, _SIGN, _STRIDE = range(6)
_SIGNED = (
    "shearx",
    "sheary",
    "translatex",
    "translatey",
    "rotate",
    "brightness",
    "saturation",
    "contrast",
    "sharpness",
)
_FACTORS = ("brightness", "saturation", "contrast", "sharpness")
_WITHOUT = ("identity", "autocontrast", "equalize", "invert")
_TORCHVISION = ("identity", *_SIGNED, "posterize", "solarize", "autocontrast", "equalize")
_TIMM = (*_SIGNED, "posterize", "solarize", "solarize_add", "autocontrast", "equalize", "invert")


def columns(policy: PolicyConfig) -> int:
    """Uniform numbers that a policy needs for an image."""
    layers = {"none": 0, "rand_augment": policy.num_ops, "timm_rand_augment": policy.num_ops, "trivial_augment": 1}
    return _STRIDE * layers.get(policy.name, 1 if policy.name == "three_augment" else 2)


def policy_layers(policy: PolicyConfig, uniforms: Numbers, rows: Rows, side: int) -> list[Layer]:
    """What a policy does to the rows of a rank, one operation of each image after another.

    Args:
        policy: which.
        uniforms: in [0, 1), for the global batch: float64 [G, columns(policy)].
        rows: of the global batch.
        side: of the images, in pixels.
    """
    steps = np.split(uniforms, uniforms.shape[1] // _STRIDE, axis=1) if uniforms.shape[1] else []
    if policy.name in ("rand_augment", "trivial_augment"):
        wishes = [_each(step, _TORCHVISION, _bins(step, policy, side)) for step in steps]
    elif policy.name == "timm_rand_augment":
        wishes = [_timm(step, policy, side) for step in steps]
    elif policy.name == "three_augment":
        wishes = [_each(step, ("grayscale", "solarize", "gaussian_blur"), _three(step)) for step in steps]
    else:
        wishes = [_of_table(policy.name, steps, at, side) for at in range(len(steps))]
    return [layer(each, rows, side) for each in wishes]


JITTER_COLUMNS = 9
_JITTERED = ("brightness", "contrast", "saturation", "hue")


def jitter_layers(jitter: ColorJitterConfig, uniforms: Numbers, rows: Rows, side: int) -> list[Layer]:
    """torchvision's ColorJitter; the four operations of each image in an order of its own.

    Args:
        jitter: how strong.
        uniforms: in [0, 1), for the global batch: float64 [G, JITTER_COLUMNS].
        rows: of the global batch.
        side: of the images, in pixels.
    """
    reaches = {"brightness": jitter.brightness, "contrast": jitter.contrast, "saturation": jitter.saturation}
    ranges = {name: (max(0.0, 1 - reach), 1 + reach) for name, reach in reaches.items() if reach}
    if jitter.hue:
        ranges["hue"] = (-jitter.hue, jitter.hue)
    if not jitter.on:
        return []
    order = np.argsort(uniforms[:, 4:8], axis=1, kind="stable")
    changed = uniforms[:, 8] < jitter.prob
    found = []
    for place in range(4):
        wishes = [
            Wish(name, changed & (order[:, place] == _JITTERED.index(name)), _between(uniforms[:, at], low, high))
            for at, name in enumerate(_JITTERED)
            if name in ranges
            for low, high in [ranges[name]]
        ]
        found.append(layer(wishes, rows, side))
    return found


def sometimes(name: str, prob: float, whether: Numbers, magnitudes: Numbers, rows: Rows, side: int) -> list[Layer]:
    """One operation, for each image with a probability: uniforms [G] and magnitudes [G] -> a layer, or none."""
    return [layer([Wish(name, whether < prob, magnitudes)], rows, side)] if prob else []


def sigmas(uniforms: Numbers) -> Numbers:
    """Of Gaussian blurs, 0.1 to 2 pixels."""
    return _between(uniforms, 0.1, 2.0)


def _three(step: Numbers) -> Callable[[str], Numbers]:
    """Magnitudes of 3-Augment: nothing to be said for grayscale, from 128 on for solarize, sigma for the blur."""
    return lambda name: sigmas(step[:, _STRENGTH]) if name == "gaussian_blur" else np.full(len(step), 128.0)


def _each(
    step: Numbers, names: Sequence[str], strength: Callable[[str], Numbers], where: NDArray[np.bool_] | None = None
) -> list[Wish]:
    """One of the operations for each image, all equally likely."""
    choice = (step[:, _CHOICE] * len(names)).astype(int)
    return [
        Wish(name, (choice == at) if where is None else where & (choice == at), strength(name))
        for at, name in enumerate(names)
    ]


def _bins(step: Numbers, policy: PolicyConfig, side: int) -> Callable[[str], Numbers]:
    wide, bins = policy.name == "trivial_augment", policy.num_magnitude_bins
    at = np.floor(step[:, _STRENGTH] * bins) if wide else np.full(len(step), policy.magnitude)
    return lambda name: torchvision_magnitude(name, at / (bins - 1), _negative(step), side, wide=wide)


def torchvision_magnitude(
    name: str, part: Numbers, negative: NDArray[np.bool_], side: int, *, wide: bool = False
) -> Numbers:
    """What torchvision makes of a bin.

    Args:
        name: of the operation.
        part: the bin, as a part of the last one, [n].
        negative: whether the sign is changed, where there is one, [n].
        side: of the images, in pixels.
        wide: whether the ranges are TrivialAugmentWide's, or those of AutoAugment and RandAugment.
    """
    if name in _WITHOUT:
        return np.zeros_like(part)
    if name == "posterize":
        return np.rint(8 - part * (6 if wide else 4))
    if name == "solarize":
        return 255 * (1 - part)
    if name in _FACTORS:
        greatest = 0.99 if wide else 0.9
    elif name.startswith("shear"):
        greatest = 0.99 if wide else 0.3
    elif name == "rotate":
        greatest = 135.0 if wide else 30.0
    else:
        greatest = 32.0 if wide else 150 / 331 * side
    magnitude = np.where(negative, -1, 1) * part * greatest
    if name.startswith("translate"):
        return np.trunc(magnitude)  # whole pixels
    return 1 + magnitude if name in _FACTORS else magnitude


def _timm(step: Numbers, policy: PolicyConfig, side: int) -> list[Wish]:
    normal = np.sqrt(-2 * np.log1p(-step[:, _STRENGTH])) * np.cos(2 * np.pi * step[:, _SECOND])
    level = np.clip(policy.magnitude + policy.magnitude_std * normal, 0, 10) / 10
    negative = _negative(step)

    def strength(name: str) -> Numbers:
        return timm_magnitude(name, level, negative, side, increasing=policy.increasing)

    return _each(step, _TIMM, strength, step[:, _WHETHER] < policy.prob)


def timm_magnitude(name: str, level: Numbers, negative: NDArray[np.bool_], side: int, *, increasing: bool) -> Numbers:
    """What timm makes of a level.

    Args:
        name: of the operation.
        level: magnitude / 10, [n].
        negative: whether the sign is changed, where there is one, [n].
        side: of the images, in pixels.
        increasing: whether the operation is to grow with the level.
    """
    sign = np.where(negative, -1, 1)
    if name in _WITHOUT:
        return np.zeros_like(level)
    if name == "posterize":
        bits = np.trunc(4 * level)
        return 4 - bits if increasing else bits
    if name == "solarize":
        threshold = np.minimum(256, np.trunc(256 * level))
        return 256 - threshold if increasing else threshold
    if name == "solarize_add":
        return np.minimum(128, np.trunc(110 * level))
    if name in _FACTORS:
        return np.maximum(0.1, 1 + sign * 0.9 * level) if increasing else 0.1 + 1.8 * level
    if name == "rotate":
        return sign * 30 * level
    if name.startswith("shear"):
        return sign * 0.3 * level
    return sign * 0.45 * level * side


@lru_cache
def _table(name: str) -> tuple[tuple[str, ...], NDArray[np.int64], Numbers, Numbers]:
    """torchvision's AutoAugment policies: the operations, and of each of R policies and both its steps which of them it
    is [R, 2], with which probability [R, 2], and how strong, as a part of the last of ten bins [R, 2]."""
    from torchvision.transforms import AutoAugment, AutoAugmentPolicy

    policies = AutoAugment(AutoAugmentPolicy(name.removeprefix("auto_augment_"))).policies
    named = [[{"color": "saturation"}.get(op.lower(), op.lower()) for op, _, _ in pair] for pair in policies]
    operations = tuple(sorted({op for pair in named for op in pair}))
    which = np.array([[operations.index(op) for op in pair] for pair in named])
    probabilities = np.array([[prob for _, prob, _ in pair] for pair in policies])
    return operations, which, probabilities, np.array([[at or 0 for _, _, at in pair] for pair in policies]) / 9


def _of_table(name: str, steps: Sequence[Numbers], at: int, side: int) -> list[Wish]:
    operations, which, probabilities, parts = _table(name)
    step = steps[at]
    policy = (steps[0][:, _CHOICE] * len(which)).astype(int)
    changed = step[:, _WHETHER] < probabilities[policy, at]
    operation, part, negative = which[policy, at], parts[policy, at], _negative(step)
    return [
        Wish(each, changed & (operation == number), torchvision_magnitude(each, part, negative, side))
        for number, each in enumerate(operations)
    ]


def _negative(step: Numbers) -> NDArray[np.bool_]:
    return step[:, _SIGN] < 0.5


def _between(uniforms: Numbers, low: float, high: float) -> Numbers:
    return low + uniforms * (high - low)

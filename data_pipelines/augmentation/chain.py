"""All of it in its order: policy, colour jitter, grayscale, blur, solarise, normalise, erase, mix."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from data_pipelines import order
from data_pipelines.augmentation import erasing, layers, mixing, policies
from data_pipelines.augmentation.parcel import Parcel
from data_pipelines.augmentation.sections import Augmentations
from data_pipelines.order import Rows
from data_pipelines.pixels import Normalise

_OTHER_COLUMNS = policies.JITTER_COLUMNS + 4


@dataclass(frozen=True)
class _View:
    """What is done to one view: the operations of each layer, and where the arrays of layers and boxes are."""

    parts: list[Sequence[tuple[str, int]]]
    layers: list[tuple[int, int]]
    boxes: list[tuple[tuple[int, int, int], str]]


@dataclass(frozen=True)
class Drawn:
    """What was drawn for the rows of a rank of one global batch."""

    parcel: Parcel
    views: list[_View]
    mixed: tuple[int, int, int] | None


class Augmenter:
    """Draws and does what a config says.

    Args:
        config: what.
        seed: of all draws.
        normalisation: mean and standard deviation of each channel, of pixels scaled to [0, 1].
        num_classes: C.
        neighbours: rows of a class that lie side by side, see `mixing`.
        device: where the images are.
    """

    def __init__(
        self,
        config: Augmentations,
        seed: int,
        normalisation: tuple[Sequence[float], Sequence[float]],
        num_classes: int,
        neighbours: int,
        device: torch.device,
    ) -> None:
        self._config, self._seed, self._num_classes, self._device = config, seed, num_classes, device
        self._neighbours = neighbours
        self._normalisation = normalisation
        self._normalise: dict[int, Normalise] = {}
        mean = [round(255 * value) for value in normalisation[0]]
        outside = mean if config.policy.name == "timm_rand_augment" else [0] * len(mean)
        if config.policy.fill is not None:
            outside = [config.policy.fill] * len(mean)
        self._fill = torch.tensor(outside, dtype=torch.uint8, device=device)

    def normalise(self, pixels: Tensor) -> Tensor:
        """Nothing but that: see `Normalise`."""
        width = pixels.shape[2]
        if width not in self._normalise:
            self._normalise[width] = Normalise(*self._normalisation, width, self._device)
        return self._normalise[width](pixels)

    def draw(self, epoch: int, step: int, size: int, rows: Rows, side: int, views: Sequence[int]) -> Drawn:
        """Draws for one global batch, and keeps what belongs to the rows of a rank; nothing happens on the device.

        Args:
            epoch: from 0.
            step: in the epoch, from 0.
            size: rows of the global batch.
            rows: of the rank.
            side: of the images, in pixels.
            views: which augmentations of the images.

        Raises:
            ValueError: mixing, and the rows part an image from its partner.
        """
        parcel, config = Parcel(), self._config
        strong = config.off_epoch is None or epoch < config.off_epoch
        seen = [
            self._draw_view(parcel, epoch, step, size, rows, side, v) if strong else _View([], [], []) for v in views
        ]
        mixed = None
        if config.mixing.on and (config.mixing.off_epoch is None or epoch < config.mixing.off_epoch):
            self._check_pairs(np.arange(size)[rows])
            uniforms = order.uniforms("mixing", self._seed, epoch, step, size, mixing.MIXING_COLUMNS)
            weights = mixing.mixing_weights(config.mixing, uniforms, rows, side, self._neighbours)
            mixed = (parcel.add(weights.own), parcel.add(weights.blended), parcel.add(weights.edges))
        parcel.close(self._device)
        return Drawn(parcel, seen, mixed)

    def _check_pairs(self, rows: np.ndarray) -> None:
        together = 2 * self._neighbours
        places = np.arange(len(rows)) % together
        if len(rows) % together or (rows % together != places).any() or (np.diff(rows)[places[1:] > 0] != 1).any():
            raise ValueError(f"rows {rows[0]} to {rows[-1] + 1} part images that are mixed, {together} side by side")

    def _draw_view(self, parcel: Parcel, epoch: int, step: int, size: int, rows: Rows, side: int, view: int) -> _View:
        config = self._config

        def uniforms(purpose: str, columns: int) -> np.ndarray:
            return order.uniforms(purpose, self._seed, epoch, step, size, columns, view)

        done: list[layers.Layer] = []
        if config.policy.name != "none":
            drawn = uniforms("policy", policies.columns(config.policy))
            done += policies.policy_layers(config.policy, drawn, rows, side)
        colours = (config.grayscale_prob, config.gaussian_blur_prob, config.solarize_prob)
        if config.color_jitter.on or any(colours):
            drawn = uniforms("colour", _OTHER_COLUMNS)
            done += policies.jitter_layers(config.color_jitter, drawn, rows, side)
            grey, blur, solar, sigma = drawn[:, policies.JITTER_COLUMNS :].T
            done += policies.sometimes("grayscale", config.grayscale_prob, grey, grey, rows, side)
            done += policies.sometimes(
                "gaussian_blur", config.gaussian_blur_prob, blur, policies.sigmas(sigma), rows, side
            )
            done += policies.sometimes("solarize", config.solarize_prob, solar, np.full(size, 128.0), rows, side)
        boxes: list[tuple[erasing.Boxes, str]] = []
        if config.cutout:
            drawn = uniforms("cutout", erasing.CUTOUT_COLUMNS)
            boxes.append((erasing.cutout_boxes(config.cutout, drawn, rows, side), "const"))
        if config.erasing.prob:
            drawn = uniforms("erasing", erasing.columns(config.erasing))
            boxes += [(each, config.erasing.mode) for each in erasing.erasing_boxes(config.erasing, drawn, rows, side)]
        done = [each for each in done if len(each.rows)]
        return _View(
            [each.parts for each in done],
            [(parcel.add(each.rows), parcel.add(each.numbers)) for each in done],
            [((parcel.add(box.rows), parcel.add(box.edges), parcel.add(box.seeds)), mode) for box, mode in boxes],
        )

    def __call__(self, views: Sequence[Tensor], classes: Tensor, drawn: Drawn) -> tuple[tuple[Tensor, ...], Tensor]:
        """Returns the views as networks take them, float32 [n, C, H, W] in channels-last memory, and the targets.

        Args:
            views: cropped and flipped, uint8 [n, H, W, C] each.
            classes: int64 [n].
            drawn: for these rows and views.
        """
        arrays = drawn.parcel.open()
        targets = classes
        if self._config.soft_targets:
            targets = mixing.smooth(classes, self._num_classes, self._config.label_smoothing)
        shown = [self._show(pixels, view, arrays) for pixels, view in zip(views, drawn.views, strict=True)]
        if drawn.mixed is not None:
            own, blended, edges = (arrays[place] for place in drawn.mixed)
            targets = mixing.mix_targets(targets, own, self._neighbours)
            shown = [mixing.mix_images(images, blended, edges, self._neighbours) for images in shown]
        return tuple(shown), targets

    def _show(self, pixels: Tensor, view: _View, arrays: list[Tensor]) -> Tensor:
        if view.layers:
            planes = pixels.permute(0, 3, 1, 2).contiguous()
            for parts, (rows, numbers) in zip(view.parts, view.layers, strict=True):
                bilinear = self._config.policy.interpolation == "bilinear"
                planes = layers.apply(planes, parts, arrays[rows], arrays[numbers], bilinear=bilinear, fill=self._fill)
            pixels = planes.permute(0, 2, 3, 1).contiguous()
        images = self.normalise(pixels)
        for places, mode in view.boxes:
            where, edges, seeds = (arrays[place] for place in places)
            erasing.erase(images, where, edges, seeds, mode)
        return images

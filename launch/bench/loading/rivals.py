"""The data path that one would write instead: torchvision's, timm's and DALI's own, each as its documentation shows.

All give what ours gives: batches of random crops of a side, mirrored by chance, normalised, in float32, on the CPU; the
rows left over at the end of an epoch are dropped.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch
from torch.utils.data import DataLoader, TensorDataset

Epoch = Callable[[], Iterable[Any]]
"""One pass over the training images, batch by batch."""

_MEAN, _STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


def torchvision_folder(folder: Path, side: int, batch: int, workers: int) -> Epoch:
    """ImageFolder, PIL and a DataLoader, as in PyTorch's ImageNet example."""
    from torchvision import transforms
    from torchvision.datasets import ImageFolder

    transform = transforms.Compose(
        [
            transforms.RandomResizedCrop(side),
            transforms.RandomHorizontalFlip(),
            transforms.ToTensor(),
            transforms.Normalize(_MEAN, _STD),
        ]
    )
    return _loader(ImageFolder(str(folder), transform), batch, workers)


def timm_folder(folder: Path, side: int, batch: int, workers: int) -> Epoch:
    """timm's data set and loader, with the same augmentation and nothing more."""
    from timm.data import create_dataset, create_loader

    return create_loader(
        create_dataset("", root=str(folder)),
        input_size=(3, side, side),
        batch_size=batch,
        is_training=True,
        use_prefetcher=False,
        color_jitter=None,
        num_workers=workers,
        pin_memory=False,
    ).__iter__


def dali_folder(folder: Path, side: int, batch: int, threads: int) -> Epoch:
    """DALI's own file reader, decoder of random crops and iterator."""
    from nvidia.dali import fn, pipeline_def, types
    from nvidia.dali.plugin.base_iterator import LastBatchPolicy
    from nvidia.dali.plugin.pytorch import DALIGenericIterator

    @pipeline_def(batch_size=batch, num_threads=threads, device_id=None)
    def graph() -> tuple[Any, ...]:
        encoded, labels = fn.readers.file(file_root=str(folder), random_shuffle=True, name="files")
        images = fn.decoders.image_random_crop(encoded, random_aspect_ratio=[3 / 4, 4 / 3], random_area=[0.08, 1.0])
        images = fn.resize(images, resize_x=side, resize_y=side, antialias=True)
        images = fn.crop_mirror_normalize(
            images,
            dtype=types.FLOAT,
            output_layout="CHW",
            mean=[255 * m for m in _MEAN],
            std=[255 * s for s in _STD],
            mirror=fn.random.coin_flip(),
        )
        return images, labels

    loader = DALIGenericIterator(
        graph(), ["images", "labels"], reader_name="files", last_batch_policy=LastBatchPolicy.DROP, auto_reset=True
    )
    return loader.__iter__


def torchvision_small(images: torch.Tensor, targets: torch.Tensor, batch: int, workers: int) -> Epoch:
    """Small images in memory by torchvision's transforms, image by image, with AutoAugment for CIFAR and Cutout."""
    from torchvision.transforms import v2

    transform = v2.Compose(
        [
            v2.RandomCrop(images.shape[-1], padding=4),
            v2.RandomHorizontalFlip(),
            v2.AutoAugment(v2.AutoAugmentPolicy.CIFAR10),
            v2.ToDtype(torch.float32, scale=True),
            v2.Normalize(_MEAN, _STD),
            v2.RandomErasing(p=1.0, scale=(0.25, 0.25), ratio=(1.0, 1.0)),
        ]
    )
    return _loader(_Transformed(images, targets, transform), batch, workers)


def timm_small(images: torch.Tensor, targets: torch.Tensor, batch: int, workers: int) -> Epoch:
    """The same by timm's loader: PIL, its AutoAugment and its erasing."""
    from timm.data import create_loader

    return create_loader(
        _Pictures(images, targets),
        input_size=tuple(images.shape[1:]),
        batch_size=batch,
        is_training=True,
        use_prefetcher=False,
        train_crop_mode="rkrc",
        scale=(1.0, 1.0),
        ratio=(1.0, 1.0),
        color_jitter=None,
        auto_augment="original",
        re_prob=1.0,
        num_workers=workers,
        pin_memory=False,
    ).__iter__


class _Transformed(TensorDataset):
    def __init__(self, images: torch.Tensor, targets: torch.Tensor, transform: Callable[[Any], torch.Tensor]) -> None:
        super().__init__(images, targets)
        self._transform = transform

    def __getitem__(self, index: int) -> tuple[torch.Tensor, ...]:
        image, target = super().__getitem__(index)
        return self._transform(image), target


class _Pictures(torch.utils.data.Dataset[tuple[Any, int]]):
    """What timm's loader wants of a data set: PIL's images, and a transform that it sets."""

    transform: Callable[[Any], Any] | None = None

    def __init__(self, images: torch.Tensor, targets: torch.Tensor) -> None:
        self._images, self._targets = images.permute(0, 2, 3, 1).numpy(), targets

    def __len__(self) -> int:
        return len(self._targets)

    def __getitem__(self, index: int) -> tuple[Any, int]:
        from PIL import Image

        image = Image.fromarray(self._images[index])
        return (self.transform(image) if self.transform else image), int(self._targets[index])


def _loader(dataset: Any, batch: int, workers: int) -> Epoch:
    # Workers that stay, so that starting them is not timed; at the end of an epoch they wait.
    return DataLoader(
        dataset, batch, shuffle=True, drop_last=True, num_workers=workers, persistent_workers=workers > 0
    ).__iter__

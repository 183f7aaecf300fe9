"""Images of another data set, or another copy of one, under the classes that a network was trained on."""

import difflib
from collections.abc import Iterator, Sequence
from dataclasses import replace

import numpy as np
import torch
from numpy.typing import NDArray

from data_pipelines.config import DataConfig
from data_pipelines.contract import Batch, DataError, Pipeline
from data_pipelines.image_folder import ImageFolder
from data_pipelines.order import Rows
from data_pipelines.resident import ResidentSet
from data_pipelines.sources import npz
from data_pipelines.sources.opening import open_validation_alone


def match(found: Sequence[str], classes: Sequence[str]) -> tuple[NDArray[np.int64], str | None]:
    """Which of a network's classes each class of a data set is.

    By name, all or none. Folders 0, 1, ..., as ImageNetV2 has them, stand for places in the sorted list of classes
    where the other side has names.

    Args:
        found: names of the data set's classes, in its order.
        classes: those of the network, in the order of its logits.

    Returns:
        The places of `found` in `classes`, and what a person should know of it.

    Raises:
        DataError: a class is none of the network's; names it and the nearest.
    """
    places = {name: place for place, name in enumerate(classes)}
    if all(name in places for name in found):
        few = f"{len(found)} of the network's {len(classes)} classes" if len(found) < len(classes) else None
        return np.array([places[name] for name in found], np.int64), few
    ordered = sorted(classes)
    if all(name.isdecimal() and int(name) < len(classes) for name in found) and not places.keys() & set(found):
        remark = (
            f"folders {min(found, key=int)} .. {max(found, key=int)} stand for places in {ordered[0]} .. {ordered[-1]}"
        )
        return np.array([places[ordered[int(name)]] for name in found], np.int64), remark
    if sorted(classes, key=_number) == [str(k) for k in range(len(found))]:
        remark = f"{min(found)} .. {max(found)}, sorted, stand for the network's classes 0 .. {len(classes) - 1}"
        return np.array([places[str(place)] for place in np.argsort(np.argsort(found))], np.int64), remark
    unknown = [name for name in found if name not in places]
    near = difflib.get_close_matches(unknown[0], classes, n=1)
    hint = f"; did you mean {near[0]!r}?" if near else ""
    raise DataError(
        f"{unknown[0]!r}: expected classes that the network was trained on ({ordered[0]}, {ordered[-1]}, ...), found "
        f"{len(unknown)} others{hint}"
    )


def _number(name: str) -> tuple[int, str]:
    return int(name) if name.isdecimal() else -1, name


def open_validation(
    config: DataConfig, classes: Sequence[str] | None, device: torch.device
) -> tuple[Pipeline, str | None]:
    """Opens the validation split alone, for networks that know some classes.

    A folder of images is ROOT/val/<class>/*.JPEG or ROOT/<class>/*.JPEG. Nothing depends on how batches would be drawn.

    Args:
        config: which images, and how they are shown.
        classes: what the networks were trained on, in the order of their logits; None if nobody knows.
        device: where the batches appear.

    Returns:
        The images, whose targets are places in `classes`, and what a person should know of it.

    Raises:
        DataError: images are missing, or of classes that the networks do not know.
    """
    whole = config.model_copy(
        update={"global_batch": 1, "sampler": "shuffle", "held_out": 0.0, "fraction": 1.0, "class_weights": None}
    )
    pipeline: Pipeline
    if config.photos:
        source = open_validation_alone(config.where, classes)
        pipeline = ImageFolder(whole, 0, device, (source, source))
    elif config.dataset == "npz":
        val, names = npz.read_validation(config.folder, config.where.val_root, *config.small)
        pipeline = ResidentSet(whole, 0, device, (val, val, names))
    else:
        pipeline = ResidentSet(whole, 0, device)
    if classes is None or pipeline.class_names is None:
        return pipeline, None
    try:
        places, remark = match(pipeline.class_names, classes)
    except DataError as error:
        pipeline.close()
        raise DataError(f"root: {config.folder}: class {error}") from None
    return _Matched(pipeline, tuple(classes), places, device), remark


class _Matched(Pipeline):
    """An open data set whose targets are places in another list of classes."""

    def __init__(
        self, whole: Pipeline, classes: tuple[str, ...], places: NDArray[np.int64], device: torch.device
    ) -> None:
        self._whole, self._places = whole, torch.from_numpy(places).to(device)
        self.class_names, self.num_classes = classes, len(classes)
        self.damage, self.remarks = whole.damage, whole.remarks
        self.channels, self.image_size, self.global_batch = whole.channels, whole.image_size, whole.global_batch
        self.train_size, self.held_out_size, self.eval_size = whole.train_size, whole.held_out_size, whole.eval_size
        self.steps_per_epoch, self.train_targets = whole.steps_per_epoch, places[whole.train_targets]

    def _named(self, batches: Iterator[Batch]) -> Iterator[Batch]:
        # Those of no class, because they cannot be read, stay so.
        places = torch.cat([self._places, self._places.new_full((1,), -1)])
        return (replace(batch, targets=places[batch.targets]) for batch in batches)

    def train(self, epoch: int, first_step: int, rows: Rows, views: Sequence[int] = (0,)) -> Iterator[Batch]:
        """See :meth:`data_pipelines.contract.Pipeline.train`."""
        return self._named(self._whole.train(epoch, first_step, rows, views))

    def evaluate(self, part: int, parts: int, batch: int) -> Iterator[Batch]:
        """See :meth:`data_pipelines.contract.Pipeline.evaluate`."""
        return self._named(self._whole.evaluate(part, parts, batch))

    def held_out(self, part: int, parts: int, batch: int) -> Iterator[Batch]:
        """See :meth:`data_pipelines.contract.Pipeline.held_out`."""
        return self._named(self._whole.held_out(part, parts, batch))

    def eval_path(self, index: int) -> str | None:
        """See :meth:`data_pipelines.contract.Pipeline.eval_path`."""
        return self._whole.eval_path(index)

    def close(self) -> None:
        """See :meth:`data_pipelines.contract.Pipeline.close`."""
        self._whole.close()

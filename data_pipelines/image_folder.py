"""ImageNet-style folders of JPEG and PNG files, decoded and cropped by DALI or torchvision, augmented on the device.

What is shown of which photo is decided here, by :mod:`data_pipelines.order` and
:mod:`data_pipelines.decoding.windows`; the decoder is told.
"""

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace

import numpy as np
import torch
from numpy.typing import NDArray

from data_pipelines import order
from data_pipelines.ahead import one_ahead
from data_pipelines.augmentation.chain import Augmenter, Drawn
from data_pipelines.config import DataConfig
from data_pipelines.contract import Batch, Pipeline
from data_pipelines.damage import Damage
from data_pipelines.decoding import windows
from data_pipelines.decoding.choice import choose
from data_pipelines.decoding.contract import Decoder, Plan, Work
from data_pipelines.decoding.dali import Graph
from data_pipelines.decoding.stream import READERS, Stream
from data_pipelines.decoding.with_torchvision import TorchvisionDecoder, silence
from data_pipelines.digest import contents
from data_pipelines.order import Rows
from data_pipelines.sampling import Sampling
from data_pipelines.sources.contract import Source
from data_pipelines.sources.opening import open_photos
from data_pipelines.sources.reading import Reader


@dataclass(frozen=True)
class _Prepared:
    """A batch that is ready to be decoded."""

    work: Work
    targets: NDArray[np.int64]
    drawn: Drawn | None


class ImageFolder(Pipeline):
    """ROOT/train/<class>/*.JPEG and ROOT/val/<class>/*.JPEG.

    Args:
        config: the folder and its augmentation.
        seed: of order and augmentation.
        device: where the batches appear; on CUDA, ``mixed`` decodes there as well.
        sources: of the two splits, where they are not those that the config names.

    Raises:
        DataError: see :func:`data_pipelines.sources.opening.open_photos`, and a class with too few photos for
            `config.sampler`.
        ValueError: a mixed decoder is asked for on a device that is not CUDA.
    """

    def __init__(
        self,
        config: DataConfig,
        seed: int,
        device: torch.device,
        sources: tuple[Source, Source] | None = None,
    ) -> None:
        silence()
        choice = choose(config.decoding.decoder, cuda=device.type == "cuda")
        train, val = sources or open_photos(config.where)
        self._decoder_name = choice.name
        self.remarks = (f"decoder: {choice}", *dict.fromkeys([*train.remarks, *val.remarks]))
        sizes = {"train": len(train), "val": len(val)}
        self.damage = Damage(config.on_error, config.max_bad, sizes)
        self._train, self._val = Reader(train, "train", self.damage), Reader(val, "val", self.damage)
        self.class_names = train.classes
        self.num_classes = len(self.class_names)
        self.channels = 3
        self.image_size = config.image.size
        self._sampling = Sampling(config, seed, train.labels, self.class_names)
        self.train_size, self.held_out_size = len(self._sampling.trained_on), len(self._sampling.held_out)
        self.eval_size = len(val)
        self.global_batch, self.steps_per_epoch = config.global_batch, self._sampling.steps
        self.train_targets, self.class_weights = self._sampling.targets, self._sampling.weights
        self.contents = contents(self.class_names, *((source.digest(), source.labels) for source in (train, val)))
        self._config, self._seed, self._device = config, seed, device
        self._augmenter = Augmenter(
            config.augmentation, seed, config.normalisation, self.num_classes, config.neighbours, device
        )
        self.may_share = config.shared_decode != "off" and config.views == "shared" and choice.name != "mixed"
        self._idle: dict[Plan, Decoder] = {}
        self._decoders = ThreadPoolExecutor(config.decoding.threads, thread_name_prefix="cohort-decoder")
        self._readers = ThreadPoolExecutor(READERS, thread_name_prefix="cohort-reader")

    def train(self, epoch: int, first_step: int, rows: Rows, views: Sequence[int] = (0,)) -> Iterator[Batch]:
        """See :meth:`data_pipelines.contract.Pipeline.train`."""
        samples = self._sampling.epoch(epoch, self.steps_per_epoch)
        size, augmentation = self.global_batch, self._config.augmentation
        area, ratio = augmentation.crop_area, augmentation.crop_ratio
        side = self._config.training_side(epoch)
        if side != self._config.training_side(max(epoch - 1, 0)):
            self._idle.clear()  # Images of the size of before are not shown again.
        sharing = self.sharing
        decoded: Rows = rows if sharing is None else sharing.rows
        largest = len(np.arange(size)[decoded])
        counted = np.full(largest, self.counts) if sharing is None else sharing.counted

        def prepare(step: int, broken: frozenset[int]) -> _Prepared:
            read = self._train.read(samples[step, decoded], self._sampling.trained_on, counted, broken)
            sizes = read.sizes
            uniforms = (order.augmentation(self._seed, epoch, step, size, windows.COLUMNS, view) for view in views)
            draws = [windows.crop_draws(each, area, ratio)[decoded] for each in uniforms]
            cropped = (windows.crop_windows(each, sizes, ratio) for each in draws)
            corners, shapes = (np.stack(each, axis=1) for each in zip(*cropped, strict=True))
            flips = np.stack([windows.flips(each) for each in draws], axis=1)
            work = Work(read.ids, read.encoded, corners, shapes, np.full_like(sizes, side), 0 * sizes, flips)
            drawn = self._augmenter.draw(epoch, step, size, rows, side, views)
            return _Prepared(work, self._train.source.labels[read.ids], drawn)

        def swap(found: _Found) -> _Found:
            prepared, (pixels,), ids = found
            assert sharing is not None
            pixels, ids = sharing.swap(pixels, ids)
            return replace(prepared, targets=self._train.source.labels[ids]), [pixels], ids

        # A photo of several views is decoded once, and then as a whole. A window is decoded without the colours beyond
        # its edges, so a rank that asks for one view where others ask for more has to decode the whole as well.
        whole = self._config.views == "per_peer"
        plan = Plan(largest, len(views), whole, side, self._config.image.interpolation == "bicubic")
        steps = range(first_step, self.steps_per_epoch)
        return self._batches(self._train, prepare, steps, plan, counted, swap if sharing else None)

    def evaluate(self, part: int, parts: int, batch: int) -> Iterator[Batch]:
        """See :meth:`data_pipelines.contract.Pipeline.evaluate`."""
        return self._as_they_are(self._val, np.arange(self.eval_size), order.part(self.eval_size, part, parts), batch)

    def eval_path(self, index: int) -> str | None:
        """See :meth:`data_pipelines.contract.Pipeline.eval_path`."""
        return self._val.source.place(index)

    def held_out(self, part: int, parts: int, batch: int) -> Iterator[Batch]:
        """See :meth:`data_pipelines.contract.Pipeline.held_out`."""
        mine = order.part(self.held_out_size, part, parts)
        return self._as_they_are(self._train, self._sampling.held_out, mine, batch)

    def _as_they_are(self, files: Reader, samples: NDArray[np.int64], mine: range, batch: int) -> Iterator[Batch]:
        """The samples at the places `mine`, in order, without augmentation."""
        counted = np.full(batch, self.counts)

        def prepare(begin: int, broken: frozenset[int]) -> _Prepared:
            ids = samples[begin : min(begin + batch, mine.stop)]
            here = counted[: len(ids)]
            if files is self._train:
                read = files.read(ids, samples, here, broken)
            else:
                read = files.read_as_they_are(ids, here, broken)
            sizes = read.sizes
            scaled, cuts = windows.validation_windows(sizes, self._config.image.resize, self.image_size)
            corners, shapes, flips = 0 * sizes[:, None], sizes[:, None], np.zeros((len(ids), 1), np.int32)
            work = Work(read.ids, read.encoded, corners, shapes, scaled, cuts, flips)
            return _Prepared(work, np.where(read.readable, files.source.labels[read.ids], -1), None)

        plan = Plan(batch, 1, False, self.image_size, self._config.image.for_validation == "bicubic")
        return self._batches(files, prepare, range(mine.start, mine.stop, batch), plan, counted)

    def close(self) -> None:
        """See :meth:`data_pipelines.contract.Pipeline.close`."""
        self._readers.shutdown(cancel_futures=True)
        self._idle.clear()
        self._decoders.shutdown(cancel_futures=True)

    def _batches(
        self,
        files: Reader,
        prepare: Callable[[int, frozenset[int]], _Prepared],
        steps: range,
        plan: Plan,
        counted: NDArray[np.bool_],
        swap: "Callable[[_Found], _Found] | None" = None,
    ) -> Iterator[Batch]:
        if not steps:
            return

        def tell(row: int, index: int, size: int) -> None:
            reason = f"expected a whole image, found {size} bytes that cannot be decoded"
            files.tell(index, reason, counts=bool(counted[row]))

        # Building one takes a second or two on a GPU. One is of a single pass at a time: training may pause for an
        # evaluation, with batches in flight.
        decoder = self._idle.pop(plan, None) or self._decoder(plan)
        stream = Stream(plan, self._decoder, decoder, prepare, tell)
        found = stream(self._readers, steps)
        pins = self._device.type == "cuda" and self._decoder_name != "mixed"
        if swap is not None:
            found = one_ahead(found, (lambda each: _pinned(swap(each))) if pins else swap)
        elif pins:
            # Copying pixels to where a GPU fetches them takes milliseconds, which the training thread shall not spend.
            found = one_ahead(found, _pinned)
        for prepared, views, ids in found:
            yield self._finish(prepared, views, ids)
            # They lie in the decoder's memory, which it wants back.
            del views
        if prepared.drawn is not None:  # What validates is used once an epoch; its memory is wanted for training.
            self._idle[plan] = stream.decoder

    def _finish(self, prepared: _Prepared, views: list[torch.Tensor], ids: NDArray[np.int64]) -> Batch:
        # With ids and targets in one copy; the ids went through the decoder, as the pixels did.
        numbers = torch.from_numpy(np.stack([ids, prepared.targets]))
        if self._device.type == "cuda":
            numbers = numbers.pin_memory()
        *views, numbers = (tensor.to(self._device, non_blocking=True) for tensor in (*views, numbers))
        # Normalising copies the pixels out of DALI's buffers, which go back to DALI when ``views`` does.
        if prepared.drawn is None:
            shown = tuple(self._augmenter.normalise(pixels) for pixels in views)
            return Batch(shown, numbers[1], numbers[0])
        return Batch(*self._augmenter(views, numbers[1], prepared.drawn), numbers[0])

    def _decoder(self, plan: Plan) -> Decoder:
        if self._decoder_name == "torchvision":
            return TorchvisionDecoder(plan, self._decoders)
        return Graph(plan, self._config.decoding.threads, self._device if self._decoder_name == "mixed" else None)


_Found = tuple[_Prepared, list[torch.Tensor], NDArray[np.int64]]


def _pinned(found: _Found) -> _Found:
    prepared, views, ids = found
    return prepared, [pixels.pin_memory() for pixels in views], ids

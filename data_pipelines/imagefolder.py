"""ImageNet-style folders of JPEG and PNG files, decoded and transformed by DALI.

DALI draws nothing and orders nothing: it is fed encoded files together with the windows, sizes and flips that
:mod:`data_pipelines.order` and :mod:`data_pipelines.windows` decided, so the pixels of a row are the same in any
batch, with any number of threads and ranks. One graph serves training and validation: only the numbers differ.
"""

import importlib.util
import io
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace
from itertools import islice
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch.utils.dlpack import from_dlpack

from data_pipelines import order, windows
from data_pipelines.config import DataConfig
from data_pipelines.contract import Batch, DataError, Pipeline
from data_pipelines.folder import Listing, list_folder
from data_pipelines.pixels import Normalise
from data_pipelines.sampling import Sampling

_GET = "Fetch the file again, or take it out"
_READERS = 4  # threads that read files, a batch each
_IN_FLIGHT = 2  # batches that DALI works on while the network trains


def require_dali() -> None:
    """Checks that DALI is installed, without loading it.

    Raises:
        DataError: it is not; the message names the extra that brings it.
    """
    try:
        found = importlib.util.find_spec("nvidia.dali") is not None
    except ModuleNotFoundError:
        found = False
    if not found:
        raise DataError(
            "image_folder needs NVIDIA DALI: pip install cohort[dali-cuda13], "
            "or cohort[dali-cuda12] where the driver is for CUDA 12"
        )


@dataclass(frozen=True)
class _Work:
    """What DALI is told of V views of n photos: encoded bytes, and (height, width) pairs in pixels."""

    ids: NDArray[np.int64]
    encoded: list[NDArray[np.uint8]]
    corners: NDArray[np.int64]  # of the window that each view shows, [n, V, 2]
    shapes: NDArray[np.int64]  # of that window, [n, V, 2]
    scaled: NDArray[np.int64]  # what the windows are resized to, [n, 2]
    cuts: NDArray[np.int64]  # corner of the output in the resized windows, [n, 2]
    flips: NDArray[np.int32]  # [n, V]


@dataclass(frozen=True)
class _Plan:
    """What a graph of DALI is built for."""

    largest: int  # photos of a batch at most
    views: int  # outputs of a photo
    whole: bool  # whether a photo is decoded as a whole, once, and all windows are cut out of that


class ImageFolder(Pipeline):
    """ROOT/train/<class>/*.JPEG and ROOT/val/<class>/*.JPEG.

    Args:
        config: the folder and its augmentation.
        seed: of order and augmentation.
        device: where the batches appear; on CUDA, ``mixed`` decodes there as well.

    Raises:
        DataError: see :func:`data_pipelines.folder.list_folder`, and a class with too few photos for `config.sampler`.
        ValueError: a mixed decoder is asked for on a device that is not CUDA.
    """

    def __init__(self, config: DataConfig, seed: int, device: torch.device) -> None:
        if config.decoder == "mixed" and device.type != "cuda":
            raise ValueError(f"decoder: mixed needs a CUDA device, found {device}; use auto or cpu")
        self._train, self._val = (_Files(listing) for listing in list_folder(config.folder))
        self.class_names = self._train.listing.classes
        self.num_classes = len(self.class_names)
        self.channels = 3
        self.image_size = config.image_size
        self._sampling = Sampling(config, seed, self._train.listing.labels, self.class_names)
        self.train_size, self.held_out_size = len(self._sampling.trained_on), len(self._sampling.held_out)
        self.eval_size = len(self._val.listing.names)
        self.global_batch, self.steps_per_epoch = config.global_batch, self._sampling.steps
        self.train_targets = self._sampling.targets
        self._config, self._seed, self._device = config, seed, device
        self._normalise = Normalise(*config.normalisation, config.image_size, device)
        self._readers = ThreadPoolExecutor(_READERS, thread_name_prefix="cohort-reader")

    def train(self, epoch: int, first_step: int, rows: slice, views: Sequence[int] = (0,)) -> Iterator[Batch]:
        """See :meth:`data_pipelines.contract.Pipeline.train`."""
        samples = self._sampling.epoch(epoch)
        size, area, ratio = self.global_batch, self._config.crop_area, self._config.crop_ratio

        def prepare(step: int) -> _Work:
            ids = samples[step, rows]
            encoded, sizes = self._train.read(ids)
            uniforms = (order.augmentation(self._seed, epoch, step, size, windows.COLUMNS, view) for view in views)
            draws = [windows.crop_draws(each, area, ratio)[rows] for each in uniforms]
            cropped = (windows.crop_windows(each, sizes, ratio) for each in draws)
            corners, shapes = (np.stack(each, axis=1) for each in zip(*cropped, strict=True))
            flips = np.stack([windows.flips(each) for each in draws], axis=1)
            return _Work(ids, encoded, corners, shapes, np.full_like(sizes, self.image_size), 0 * sizes, flips)

        largest = len(range(*rows.indices(size)))
        # A photo of several views is decoded once, and then as a whole. A window is decoded without the colours beyond
        # its edges, so a rank that asks for one view where others ask for more has to decode the whole as well.
        whole = self._config.views == "per_peer"
        plan = _Plan(largest, len(views), whole)
        return self._batches(self._train, prepare, range(first_step, self.steps_per_epoch), plan)

    def evaluate(self, part: int, parts: int, batch: int) -> Iterator[Batch]:
        """See :meth:`data_pipelines.contract.Pipeline.evaluate`."""
        return self._as_they_are(self._val, np.arange(self.eval_size), order.part(self.eval_size, part, parts), batch)

    def held_out(self, part: int, parts: int, batch: int) -> Iterator[Batch]:
        """See :meth:`data_pipelines.contract.Pipeline.held_out`."""
        mine = order.part(self.held_out_size, part, parts)
        return self._as_they_are(self._train, self._sampling.held_out, mine, batch)

    def _as_they_are(self, files: "_Files", samples: NDArray[np.int64], mine: range, batch: int) -> Iterator[Batch]:
        """The samples at the places `mine`, in order, without augmentation."""

        def prepare(begin: int) -> _Work:
            ids = samples[begin : min(begin + batch, mine.stop)]
            encoded, sizes = files.read(ids)
            scaled, cuts = windows.validation_windows(sizes, self._config.resize, self.image_size)
            corners, shapes, flips = 0 * sizes[:, None], sizes[:, None], np.zeros((len(ids), 1), np.int32)
            return _Work(ids, encoded, corners, shapes, scaled, cuts, flips)

        return self._batches(files, prepare, range(mine.start, mine.stop, batch), _Plan(batch, 1, False))

    def close(self) -> None:
        """See :meth:`data_pipelines.contract.Pipeline.close`."""
        self._readers.shutdown(cancel_futures=True)

    def _batches(self, files: "_Files", prepare: Callable[[int], _Work], steps: range, plan: _Plan) -> Iterator[Batch]:
        if not steps:
            return
        # A graph of its own for each pass: training may pause for an evaluation with batches in flight.
        graph = self._graph(plan)
        pending: deque[_Work] = deque()
        try:
            for work in _ahead(self._readers, prepare, steps):
                pending.append(work)
                graph.feed(work)
                if len(pending) > _IN_FLIGHT:
                    yield self._finish(graph, files, pending)
            while pending:
                yield self._finish(graph, files, pending)
        except RuntimeError as error:
            broken = self._broken_file(files, pending, plan)
            if broken is None:
                raise
            raise broken from error

    def _finish(self, graph: "_Graph", files: "_Files", pending: deque[_Work]) -> Batch:
        views, ids = graph.take()
        # With ids and labels in one copy; the ids went through DALI, so they cannot get out of step with the pixels.
        numbers = torch.from_numpy(np.stack([ids, files.listing.labels[ids]]))
        if self._device.type == "cuda":
            numbers = numbers.pin_memory()
            views = [pixels if pixels.is_cuda else pixels.pin_memory() for pixels in views]
        *views, numbers = (tensor.to(self._device, non_blocking=True) for tensor in (*views, numbers))
        # Normalising copies the pixels out of DALI's buffers, which go back to DALI when ``views`` does.
        batch = Batch(tuple(self._normalise(pixels) for pixels in views), numbers[1], numbers[0])
        pending.popleft()
        return batch

    def _graph(self, plan: _Plan) -> "_Graph":
        mixed = self._device.type == "cuda" and self._config.decoder != "cpu"
        return _Graph(plan, self._config.threads, self.image_size, self._device if mixed else None)

    def _broken_file(self, files: "_Files", pending: deque[_Work], plan: _Plan) -> DataError | None:
        """Finds the file that stopped DALI, which names only the batch, by decoding one at a time."""
        graph = self._graph(replace(plan, largest=1))
        for work in pending:
            for index, name in enumerate(work.ids):
                one = slice(index, index + 1)
                try:
                    graph.feed(_Work(*(field[one] for field in vars(work).values())))
                    graph.take()
                except RuntimeError:
                    return DataError(
                        f"{files.listing.path(name)}: expected a whole JPEG or PNG image, found "
                        f"{work.encoded[index].size} bytes that cannot be decoded. {_GET}"
                    )
        return None


class _Files:
    """Reads encoded files, and remembers the size of each photo once its header was seen."""

    def __init__(self, listing: Listing) -> None:
        self.listing = listing
        self._sizes = np.zeros((len(listing.names), 2), np.int32)

    def read(self, ids: NDArray[np.int64]) -> tuple[list[NDArray[np.uint8]], NDArray[np.int64]]:
        """Returns the bytes of each file, and the (height, width) of each photo, int64 [n, 2]."""
        encoded = [self._read(index) for index in ids]
        return encoded, self._sizes[ids].astype(np.int64)

    def _read(self, index: int) -> NDArray[np.uint8]:
        path = self.listing.path(index)
        try:
            with open(path, "rb") as file:
                encoded = file.read()
            if not self._sizes[index, 0]:
                with Image.open(io.BytesIO(encoded), formats=("JPEG", "PNG")) as header:
                    self._sizes[index] = header.height, header.width
        except OSError as error:
            raise DataError(
                f"{path}: expected a JPEG or PNG image, found a file that is neither or cannot be read. {_GET}"
            ) from error
        return np.frombuffer(encoded, np.uint8)


class _Graph:
    """Decodes a window, resizes it, cuts the output out of it and flips that, for each view; fed by hand, never ahead.

    Args:
        plan: how large, how many and from what.
        threads: of DALI.
        image_size: side of the output, in pixels.
        device: the CUDA device that decodes, or None for the CPU.
    """

    def __init__(self, plan: _Plan, threads: int, image_size: int, device: torch.device | None) -> None:
        from nvidia.dali import fn, pipeline_def, types

        decoding: dict[str, Any] = {
            "device": "mixed" if device else "cpu",
            # The window was chosen by the header's size, which knows nothing of EXIF.
            "adjust_orientation": False,
            # As libjpeg does on the CPU, so that both decoders give nearly the same pixels.
            "jpeg_fancy_upsampling": True,
        }

        def numbers(name: str, ndim: int = 1) -> Any:
            return fn.external_source(name=name, dtype=types.INT32, ndim=ndim)

        @pipeline_def(
            batch_size=plan.largest,
            num_threads=threads,
            device_id=None if device is None else torch.empty(0, device=device).get_device(),
            prefetch_queue_depth=1,  # how far to work ahead is decided by who feeds
        )
        def graph() -> tuple[Any, ...]:
            encoded = fn.external_source(name="encoded", dtype=types.UINT8, ndim=1)
            scaled, cuts = fn.cast(numbers("scaled"), dtype=types.FLOAT), numbers("cuts")
            photos = fn.decoders.image(encoded, **decoding) if plan.whole else None
            outputs = []
            for view in range(plan.views):
                window = {"start": numbers(f"corners{view}"), "shape": numbers(f"shapes{view}"), "axis_names": "HW"}
                if plan.whole:
                    images = fn.slice(photos, **window)
                else:
                    images = fn.decoders.image_slice(encoded, **window, **decoding)
                images = fn.resize(images, size=scaled, antialias=True)
                images = fn.slice(images, start=cuts, shape=[image_size, image_size], axis_names="HW")
                outputs.append(fn.flip(images, horizontal=numbers(f"flips{view}", 0), vertical=0))
            return *outputs, fn.external_source(name="ids", dtype=types.INT64, ndim=0)

        self._views = plan.views
        self._device = device
        self._pipe = graph()
        self._pipe.build()

    def feed(self, work: _Work) -> None:
        """Starts to work on a batch, without waiting for it.

        Raises:
            RuntimeError: an earlier batch cannot be decoded.
        """
        for name in ("scaled", "cuts"):
            self._pipe.feed_input(name, getattr(work, name).astype(np.int32))
        for name in ("corners", "shapes", "flips"):
            for view in range(self._views):
                self._pipe.feed_input(f"{name}{view}", np.ascontiguousarray(getattr(work, name)[:, view], np.int32))
        for name in ("encoded", "ids"):
            self._pipe.feed_input(name, getattr(work, name))
        self._pipe.schedule_run()

    def take(self) -> tuple[list[torch.Tensor], NDArray[np.int64]]:
        """Waits for the oldest batch: uint8 [n, H, W, C] of each view in DALI's own memory, and ids int64 [n].

        Raises:
            RuntimeError: a photo cannot be decoded.
        """
        # Outputs belong to the stream that will read them, so DALI takes their memory back in that stream's order.
        stream = torch.cuda.current_stream(self._device) if self._device else None
        *views, ids = self._pipe.share_outputs(cuda_stream=stream)
        self._pipe.release_outputs()
        return [from_dlpack(images.as_tensor()) for images in views], np.array(ids.as_tensor())


def _ahead(pool: ThreadPoolExecutor, prepare: Callable[[int], _Work], steps: range) -> Iterator[_Work]:
    """Yields what ``prepare`` gives for each step, in order, while the pool is some steps ahead."""
    left = iter(steps)
    futures: deque[Future[_Work]] = deque(pool.submit(prepare, step) for step in islice(left, _READERS))
    try:
        while futures:
            work = futures.popleft().result()
            futures.extend(pool.submit(prepare, step) for step in islice(left, 1))
            yield work
    finally:
        for future in futures:
            future.cancel()

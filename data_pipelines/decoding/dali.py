"""NVIDIA DALI as a function: encoded photos, windows, sizes and flips in, pixels out.

DALI draws nothing and orders nothing, so the pixels of a row are the same in any batch, with any number of threads and
ranks. One graph serves training and validation: only the numbers differ.
"""

import importlib.util
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch.utils.dlpack import from_dlpack

from data_pipelines.contract import DataError


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
class Work:
    """What DALI is told of V views of n photos: encoded bytes, and (height, width) pairs in pixels."""

    ids: NDArray[np.int64]
    encoded: list[NDArray[np.uint8]]
    corners: NDArray[np.int64]  # of the window that each view shows, [n, V, 2]
    shapes: NDArray[np.int64]  # of that window, [n, V, 2]
    scaled: NDArray[np.int64]  # what the windows are resized to, [n, 2]
    cuts: NDArray[np.int64]  # corner of the output in the resized windows, [n, 2]
    flips: NDArray[np.int32]  # [n, V]


@dataclass(frozen=True)
class Plan:
    """What a graph of DALI is built for."""

    largest: int  # photos of a batch at most
    views: int  # outputs of a photo
    whole: bool  # whether a photo is decoded as a whole, once, and all windows are cut out of that


class Graph:
    """Decodes a window, resizes it, cuts the output out of it and flips that, for each view; fed by hand, never ahead.

    Args:
        plan: how large, how many and from what.
        threads: of DALI.
        image_size: side of the output, in pixels.
        device: the CUDA device that decodes, or None for the CPU.
    """

    def __init__(self, plan: Plan, threads: int, image_size: int, device: torch.device | None) -> None:
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

    def feed(self, work: Work) -> None:
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

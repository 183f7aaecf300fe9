"""NVIDIA DALI as a function. One graph serves training and validation: only the numbers differ."""

from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch.utils.dlpack import from_dlpack

from data_pipelines.decoding.contract import Plan, Work


class Graph:
    """See :class:`data_pipelines.decoding.contract.Decoder`; fed by hand, never ahead.

    Args:
        plan: how large, how many and from what.
        threads: of DALI.
        device: the CUDA device that decodes, or None for the CPU.
    """

    def __init__(self, plan: Plan, threads: int, device: torch.device | None) -> None:
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
                how = types.INTERP_CUBIC if plan.cubic else types.INTERP_LINEAR
                images = fn.resize(images, size=scaled, antialias=True, interp_type=how)
                images = fn.slice(images, start=cuts, shape=[plan.side, plan.side], axis_names="HW")
                outputs.append(fn.flip(images, horizontal=numbers(f"flips{view}", 0), vertical=0))
            return *outputs, fn.external_source(name="ids", dtype=types.INT64, ndim=0)

        self.plan = plan
        self._device = device
        self._pipe = graph()
        self._pipe.build()

    def feed(self, work: Work) -> None:
        """See :meth:`data_pipelines.decoding.contract.Decoder.feed`."""
        for name in ("scaled", "cuts"):
            self._pipe.feed_input(name, getattr(work, name).astype(np.int32))
        for name in ("corners", "shapes", "flips"):
            for view in range(self.plan.views):
                self._pipe.feed_input(f"{name}{view}", np.ascontiguousarray(getattr(work, name)[:, view], np.int32))
        for name in ("encoded", "ids"):
            self._pipe.feed_input(name, getattr(work, name))
        self._pipe.schedule_run()

    def take(self) -> tuple[list[torch.Tensor], NDArray[np.int64]]:
        """See :meth:`data_pipelines.decoding.contract.Decoder.take`; the pixels lie in DALI's own memory."""
        # Outputs belong to the stream that will read them, so DALI takes their memory back in that stream's order.
        stream = torch.cuda.current_stream(self._device) if self._device else None
        *views, ids = self._pipe.share_outputs(cuda_stream=stream)
        self._pipe.release_outputs()
        return [from_dlpack(images.as_tensor()) for images in views], np.array(ids.as_tensor())

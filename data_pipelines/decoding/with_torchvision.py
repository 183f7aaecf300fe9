"""torchvision's decoders, for machines without DALI: whole photos on CPU threads, resized as uint8."""

import io
import warnings
from collections import deque
from concurrent.futures import Future, ThreadPoolExecutor

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image

from data_pipelines.decoding.contract import Plan, Work


class TorchvisionDecoder:
    """See :class:`data_pipelines.decoding.contract.Decoder`.

    Args:
        plan: how many and how large.
        pool: whose threads decode, a photo each; it outlives the decoder.
    """

    def __init__(self, plan: Plan, pool: ThreadPoolExecutor) -> None:
        self.plan, self._pool = plan, pool
        self._pending: deque[tuple[Work, list[Future[list[torch.Tensor]]]]] = deque()

    def feed(self, work: Work) -> None:
        """See :meth:`data_pipelines.decoding.contract.Decoder.feed`."""
        photos = [self._pool.submit(self._photo, work, index) for index in range(len(work.ids))]
        self._pending.append((work, photos))

    def take(self) -> tuple[list[torch.Tensor], NDArray[np.int64]]:
        """See :meth:`data_pipelines.decoding.contract.Decoder.take`."""
        work, photos = self._pending.popleft()
        views = zip(*(photo.result() for photo in photos), strict=True)
        return [torch.stack(view) for view in views], work.ids

    def _photo(self, work: Work, index: int) -> list[torch.Tensor]:
        pixels = decoded(work.encoded[index].tobytes())
        return [self._view(pixels, work, index, view) for view in range(self.plan.views)]

    def _view(self, pixels: torch.Tensor, work: Work, index: int, view: int) -> torch.Tensor:
        (top, left), (height, width) = work.corners[index, view].tolist(), work.shapes[index, view].tolist()
        if top + height > pixels.shape[1] or left + width > pixels.shape[2]:
            raise RuntimeError(f"expected {top + height} x {left + width} pixels or more, found {list(pixels.shape)}")
        window = pixels[:, top : top + height, left : left + width].unsqueeze(0)
        window = window.contiguous(memory_format=torch.channels_last)  # which is resized in one go, not by channels
        scaled = torch.nn.functional.interpolate(
            window,
            work.scaled[index].tolist(),
            mode="bicubic" if self.plan.cubic else "bilinear",
            antialias=True,
            align_corners=False,
        )
        (top, left), side = work.cuts[index].tolist(), self.plan.side
        shown = scaled[0, :, top : top + side, left : left + side]
        return (shown.flip(2) if work.flips[index, view] else shown).permute(1, 2, 0).contiguous()


def silence() -> None:
    """Keeps torchvision from saying with each photo that TorchCodec will take its place, which wants an FFmpeg, and PIL
    from taking photos of 90 megapixels for an attack."""
    warnings.filterwarnings("ignore", message="The image decoding and encoding capabilities of TorchVision")
    warnings.filterwarnings("ignore", category=Image.DecompressionBombWarning)


def decoded(encoded: bytes) -> torch.Tensor:
    """uint8 [3, H, W] of a JPEG, PNG, WebP or BMP file, by what is in it rather than by its name.

    Raises:
        RuntimeError: it cannot be decoded.
    """
    if encoded[:2] == b"\xff\xd8":
        from torchvision.io import ImageReadMode, decode_jpeg

        # A copy: bytes that were read may not be written to, and PyTorch warns of that.
        return decode_jpeg(
            torch.frombuffer(bytearray(encoded), dtype=torch.uint8),
            mode=ImageReadMode.RGB,
            apply_exif_orientation=False,
        )
    # The few others by PIL: on a damaged PNG torchvision 0.29 ends the process by a segmentation fault.
    try:
        with Image.open(io.BytesIO(encoded)) as image:
            if image.mode.startswith("I"):  # 16 bits
                image = Image.fromarray((np.asarray(image) >> 8).astype(np.uint8))
            return torch.from_numpy(np.array(image.convert("RGB"))).permute(2, 0, 1)
    except Exception as error:  # PIL's readers pass on whatever Python makes of a damaged file.
        raise RuntimeError(f"cannot be decoded: {error}") from None

"""The bytes of image files, and whether they are all there."""

import errno
import io
import time
from collections.abc import Callable, Mapping
from functools import lru_cache
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image, UnidentifiedImageError

from data_pipelines.damage import UnreadableError

_FORMATS = ("JPEG", "PNG", "WEBP", "BMP", "PPM", "TIFF")  # by what is in a file, whatever its name says
_BITS = {"1;I": 1, "L": 8, "RGB": 24, "I;16B": 16}  # a pixel, in a PPM or PGM file as PIL calls it
_WAITS = (0.1, 1.0, 5.0)  # seconds before a disk that does not answer is asked again
_PASSING = (errno.EIO, errno.ETIMEDOUT, errno.ESTALE, errno.EAGAIN, errno.EHOSTDOWN, errno.ENETDOWN)


def read_bytes(path: str) -> bytes:
    """Returns what is in a file; a disk that answers with an error that may pass is asked three times more.

    Raises:
        UnreadableError: it is not there, is empty, or cannot be read.
    """

    def read() -> bytes:
        with open(path, "rb") as file:
            return file.read()

    content = patiently(read)
    if not content:
        raise UnreadableError("expected an image, found an empty file")
    return content


def patiently(read: Callable[[], bytes]) -> bytes:
    """What `read` gives; a disk that answers with an error that may pass is asked three times more.

    Raises:
        UnreadableError: there is no file, or it cannot be read.
    """
    for wait in (*_WAITS, None):
        try:
            return read()
        except FileNotFoundError:
            raise UnreadableError("expected an image, found no file") from None
        except OSError as error:
            if wait is None or error.errno not in _PASSING:
                raise UnreadableError(f"cannot be read: {error.strerror}") from None
            time.sleep(wait)
    raise AssertionError


def measured(content: bytes) -> tuple[int, int]:
    """Returns (height, width) in pixels, by the header.

    Raises:
        UnreadableError: it is no image, has no pixels, or ends too early.
    """
    try:
        with Image.open(io.BytesIO(content), formats=_FORMATS) as header:
            height, width, kind = header.height, header.width, str(header.format)
            needed = _bytes_of_tiles(header) if kind in ("PPM", "TIFF") else 0
    except Image.DecompressionBombError as error:
        raise UnreadableError(f"expected a smaller image: {str(error).removesuffix('.')}") from None
    except UnidentifiedImageError:
        raise UnreadableError(
            "expected a JPEG or PNG image, found a file that is neither, or whose beginning is damaged"
        ) from None
    except Exception as error:  # PIL's readers pass on whatever Python makes of a damaged file.
        raise UnreadableError(f"expected a JPEG or PNG image, found a beginning that cannot be read: {error}") from None
    if not height or not width:
        raise UnreadableError(f"expected an image, found {height} x {width} pixels")
    if len(content) < needed or not _whole(content, kind):
        raise UnreadableError(f"expected a whole image, found {len(content)} bytes of a {kind} file that was cut short")
    return height, width


@lru_cache
def stand_in() -> tuple[NDArray[np.uint8], tuple[int, int]]:
    """A small grey image, encoded, in the place of one that is counted as wrong; and its (height, width)."""
    buffer = io.BytesIO()
    Image.new("RGB", (16, 16), (124, 116, 104)).save(buffer, format="PNG")
    return np.frombuffer(buffer.getvalue(), np.uint8), (16, 16)


def _bytes_of_tiles(header: Image.Image) -> int:
    """Where the pixels of a PPM or TIFF file end at the earliest, by its header."""
    if header.format == "TIFF":
        tags: Mapping[int, Any] = header.tag_v2  # type: ignore[attr-defined]
        for offsets, counts in ((273, 279), (324, 325)):  # of its strips, or of its tiles
            if offsets in tags and counts in tags:
                return max(map(sum, zip(_numbers(tags[offsets]), _numbers(tags[counts]), strict=False)), default=0)
        return 0
    (codec, _, offset, layout), *_ = header.tile  # type: ignore[attr-defined]
    bits = _BITS.get(layout) if codec == "raw" else None
    return offset + header.height * ((header.width * bits + 7) // 8) if bits else 0


def _numbers(value: Any) -> tuple[int, ...]:
    return value if isinstance(value, tuple) else (value,)


def _whole(content: bytes, kind: str) -> bool:
    """Whether a file's end is there: not all crops reach the rows that a file lacks, so a decoder may not notice."""
    if kind in ("JPEG", "MPO"):
        # The last scan is followed by the end of the image; both markers come earlier too, in thumbnails.
        return content.rfind(b"\xff\xd9") > content.rfind(b"\xff\xda")
    if kind == "PNG":
        return content.rfind(b"IEND") > 0
    if kind in ("PPM", "TIFF"):
        return True
    said = int.from_bytes(content[4:8], "little") + 8 if kind == "WEBP" else int.from_bytes(content[2:6], "little")
    return len(content) >= said

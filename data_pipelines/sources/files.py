"""The bytes of image files, and whether they are all there."""

import errno
import io
import time
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray
from PIL import Image, UnidentifiedImageError

from data_pipelines.damage import UnreadableError

_FORMATS = ("JPEG", "PNG", "WEBP", "BMP")  # by what is in a file, whatever its name says
_WAITS = (0.1, 1.0, 5.0)  # seconds before a disk that does not answer is asked again
_PASSING = (errno.EIO, errno.ETIMEDOUT, errno.ESTALE, errno.EAGAIN, errno.EHOSTDOWN, errno.ENETDOWN)


def read_bytes(path: str) -> bytes:
    """Returns what is in a file; a disk that answers with an error that may pass is asked three times more.

    Raises:
        UnreadableError: it is not there, is empty, or cannot be read.
    """
    for wait in (*_WAITS, None):
        try:
            with open(path, "rb") as file:
                content = file.read()
            break
        except FileNotFoundError:
            raise UnreadableError("expected an image, found no file") from None
        except OSError as error:
            if wait is None or error.errno not in _PASSING:
                raise UnreadableError(f"cannot be read: {error.strerror}") from None
            time.sleep(wait)
    if not content:
        raise UnreadableError("expected an image, found an empty file")
    return content


def measured(content: bytes) -> tuple[int, int]:
    """Returns (height, width) in pixels, by the header.

    Raises:
        UnreadableError: it is no image, has no pixels, or ends too early.
    """
    try:
        with Image.open(io.BytesIO(content), formats=_FORMATS) as header:
            height, width, kind = header.height, header.width, header.format
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
    if not _whole(content, str(kind)):
        raise UnreadableError(f"expected a whole image, found {len(content)} bytes of a {kind} file that was cut short")
    return height, width


@lru_cache
def stand_in() -> tuple[NDArray[np.uint8], tuple[int, int]]:
    """A small grey image, encoded, in the place of one that is counted as wrong; and its (height, width)."""
    buffer = io.BytesIO()
    Image.new("RGB", (16, 16), (124, 116, 104)).save(buffer, format="PNG")
    return np.frombuffer(buffer.getvalue(), np.uint8), (16, 16)


def _whole(content: bytes, kind: str) -> bool:
    """Whether a file's end is there: not all crops reach the rows that a file lacks, so a decoder may not notice."""
    if kind in ("JPEG", "MPO"):
        # The last scan is followed by the end of the image; both markers come earlier too, in thumbnails.
        return content.rfind(b"\xff\xd9") > content.rfind(b"\xff\xda")
    if kind == "PNG":
        return content.rfind(b"IEND") > 0
    said = int.from_bytes(content[4:8], "little") + 8 if kind == "WEBP" else int.from_bytes(content[2:6], "little")
    return len(content) >= said

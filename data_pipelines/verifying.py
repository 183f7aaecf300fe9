"""Looks at every file of a data set beforehand: what a run would meet one by one, in one go."""

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from data_pipelines.damage import Damaged, UnreadableError
from data_pipelines.decoding.with_torchvision import decoded, silence
from data_pipelines.sources.class_folders import Listing, list_folder
from data_pipelines.sources.files import measured, read_bytes

_AT_ONCE = 4096  # files that wait for a thread


def count(root: Path) -> int:
    """The files of a folder of photos, those of both splits. Raises: DataError, see `list_folder`."""
    return sum(len(listing.names) for listing in list_folder(root))


def verify(root: Path, threads: int) -> Iterator[Damaged | None]:
    """Reads and decodes each file of a folder of photos, as a whole.

    Args:
        root: of the folder.
        threads: files at a time.

    Yields:
        For each file, in order, what is wrong with it, or None.

    Raises:
        DataError: see :func:`data_pipelines.sources.class_folders.list_folder`.
    """
    silence()
    with ThreadPoolExecutor(threads, thread_name_prefix="cohort-verify") as pool:
        for split, listing in zip(("train", "val"), list_folder(root), strict=True):
            size = len(listing.names)
            for begin in range(0, size, _AT_ONCE):
                yield from pool.map(
                    _look, [(split, listing, index) for index in range(begin, min(begin + _AT_ONCE, size))]
                )


def _look(sample: tuple[str, Listing, int]) -> Damaged | None:
    split, listing, index = sample
    path = listing.path(index)
    try:
        content = read_bytes(path)
        height, width = measured(content)
        found = decoded(content).shape[1:]
        if tuple(found) != (height, width):
            raise UnreadableError(f"expected {height} x {width} pixels by its header, found {found[0]} x {found[1]}")
    except UnreadableError as error:
        return Damaged(split, path, str(error))
    except RuntimeError:
        return Damaged(split, path, f"expected a whole image, found {len(content)} bytes that cannot be decoded")
    return None

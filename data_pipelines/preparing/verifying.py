"""Looks at every file of a data set beforehand: what a run would meet one by one, in one go."""

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

from data_pipelines.damage import Damaged, UnreadableError
from data_pipelines.decoding.with_torchvision import silence
from data_pipelines.preparing.whole import whole
from data_pipelines.sources.contract import Source
from data_pipelines.sources.opening import open_photos
from data_pipelines.sources.sections import Where

_AT_ONCE = 4096  # files that wait for a thread


def count(where: Where) -> int:
    """The photos of a data set, those of both splits. Raises: DataError, see `open_photos`."""
    return sum(map(len, open_photos(where)))


def verify(where: Where, threads: int) -> Iterator[Damaged | None]:
    """Reads and decodes each photo of a data set, as a whole.

    Args:
        where: they are.
        threads: photos at a time.

    Yields:
        For each, in order, what is wrong with it, or None.

    Raises:
        DataError: see :func:`data_pipelines.sources.opening.open_photos`.
    """
    silence()
    with ThreadPoolExecutor(threads, thread_name_prefix="cohort-verify") as pool:
        for split, source in zip(("train", "val"), open_photos(where), strict=True):
            size = len(source)
            for begin in range(0, size, _AT_ONCE):
                yield from pool.map(
                    _look, [(split, source, index) for index in range(begin, min(begin + _AT_ONCE, size))]
                )


def _look(sample: tuple[str, Source, int]) -> Damaged | None:
    split, source, index = sample
    path = source.place(index)
    try:
        whole(source.read(index))
    except UnreadableError as error:
        return Damaged(split, path, str(error))
    return None

"""Many names in little memory: a list of 1.28 million strings takes 100 MB in each process, this 30."""

import hashlib
from collections.abc import Iterable, Sequence
from typing import overload

import numpy as np
from numpy.typing import NDArray


class Names(Sequence[str]):
    """Names of files, of which each may hold any bytes.

    Args:
        text: all names, one after another with a slash between two, uint8.
        ends: where each ends in it, int64 [N].
    """

    def __init__(self, text: NDArray[np.uint8], ends: NDArray[np.int64]) -> None:
        self.text, self.ends = text, ends

    @classmethod
    def of(cls, names: Iterable[str]) -> "Names":
        """Packs names."""
        encoded = [encode(name) for name in names]
        lengths = np.fromiter((len(name) + 1 for name in encoded), np.int64, len(encoded))
        return cls(np.frombuffer(b"/".join(encoded), np.uint8), np.cumsum(lengths) - 1)

    def __len__(self) -> int:
        return len(self.ends)

    @overload
    def __getitem__(self, index: int) -> str: ...
    @overload
    def __getitem__(self, index: slice) -> list[str]: ...
    def __getitem__(self, index: int | slice) -> str | list[str]:
        if isinstance(index, slice):
            return [self[k] for k in range(*index.indices(len(self)))]
        index = range(len(self))[index]
        begin = int(self.ends[index - 1]) + 1 if index else 0
        return decode(self.text[begin : int(self.ends[index])].tobytes())

    def valid(self) -> bool:
        """Whether the ends belong to the text, and no name leads out of the folder that it is in."""
        ends, text = self.ends, self.text
        if not len(ends):
            return not len(text)
        parts = text.tobytes().split(b"/")
        return bool(
            ends[-1] == len(text)
            and (np.diff(ends, prepend=-1) > 0).all()
            and (text[ends[:-1]] == ord("/")).all()
            and not {b"", b".", b".."} & set(parts)
        )

    def digest(self) -> str:
        """SHA-256 of the text, as hex digits."""
        return hashlib.sha256(self.text.tobytes()).hexdigest()


def encode(name: str) -> bytes:
    """The bytes of a file's name; surrogates stand for those that are no text."""
    return name.encode("utf-8", "surrogateescape")


def decode(name: bytes) -> str:
    """The other way round."""
    return name.decode("utf-8", "surrogateescape")

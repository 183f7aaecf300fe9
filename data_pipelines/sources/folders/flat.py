"""Images side by side in one folder, whose classes stand in a file: ILSVRC's own validation split."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from data_pipelines.damage import DataError
from data_pipelines.sources.contract import Source, left_out
from data_pipelines.sources.files import read_bytes
from data_pipelines.sources.folders.walking import EXTENSIONS, Links, require_allowed, walk
from data_pipelines.sources.labels import read_labels
from data_pipelines.sources.names import Names


class FlatFolder(Source):
    """FOLDER/*.JPEG, sorted by name.

    Args:
        folder: of the split.
        labels_file: see :func:`data_pipelines.sources.labels.read_labels`.
        classes: those of the training split, in the order of labels; None if there is none.
        listed: whether `data.classes` lists them.
        root: that links may not leave.
        links: unless they may.

    Raises:
        DataError: there is no such folder or image, or an image of no class or of one that is not known.
    """

    def __init__(
        self,
        folder: Path,
        labels_file: Path,
        classes: Sequence[str] | None,
        *,
        listed: bool,
        root: Path,
        links: Links,
    ) -> None:
        if not folder.is_dir():
            raise DataError(f"{folder}: no such folder; expected the images of val_labels = {labels_file}")
        require_allowed(folder, root, links)
        found = walk(folder, root, links, nested=False)
        if not found.names:
            raise DataError(
                f"{folder}: expected at least one image ({', '.join(EXTENSIONS)}) for val_labels = {labels_file}, "
                "found none"
            )
        given = read_labels(labels_file, found.names, classes, listed=listed)
        self.classes = tuple(classes) if listed and classes is not None else tuple(sorted(set(given)))
        places = {name: place for place, name in enumerate(self.classes)}
        for image, name in zip(found.names, given, strict=True):
            if name not in places:
                raise DataError(f"val_labels: {labels_file}: {name!r} of {image} is not listed in data.classes")
        self.folder, self.names = folder, Names.of(found.names)
        self.labels = np.array([places[name] for name in given], np.int64)
        self.remarks = left_out(sorted(found.left.items()), str(folder))

    def read(self, index: int) -> bytes:
        """See :meth:`data_pipelines.sources.contract.Source.read`."""
        return read_bytes(self.place(index))

    def place(self, index: int) -> str:
        """See :meth:`data_pipelines.sources.contract.Source.place`."""
        return f"{self.folder}/{self.names[index]}"

    def place_of_class(self, label: int) -> str:
        """See :meth:`data_pipelines.sources.contract.Source.place_of_class`."""
        return f"{self.folder}, class {self.classes[label]}"

    def digest(self) -> str:
        """See :meth:`data_pipelines.sources.contract.Source.digest`."""
        return self.names.digest()

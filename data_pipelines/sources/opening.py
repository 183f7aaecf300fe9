"""From what a run says to the two splits of its photos."""

from collections.abc import Sequence
from dataclasses import replace
from functools import lru_cache

from data_pipelines.damage import DataError
from data_pipelines.sources import hub
from data_pipelines.sources.contract import Source
from data_pipelines.sources.folders import class_folders
from data_pipelines.sources.folders.flat import FlatFolder
from data_pipelines.sources.labels import ordered, read_classes
from data_pipelines.sources.sections import Where
from data_pipelines.sources.shards import tar_shards
from data_pipelines.sources.shards.tar_shards import TarShards, shards_of

_GET = {"image_folder": class_folders.GET, "webdataset": tar_shards.GET, "hub": hub.GET}


# Whoever checks and whoever opens both ask, and a walk of a million files on a network disk takes minutes.
@lru_cache(maxsize=1)
def open_photos(where: Where) -> tuple[Source, Source]:
    """Opens the training and the validation split.

    Raises:
        DataError: something is missing, empty, damaged or not as expected, or the classes of the splits differ.
    """
    where, listed = _listed(where)
    train = _under(where, listed, _open(where, "train", listed, listed=listed is not None), "train")
    val = _under(where, listed, _open(where, "val", train.classes, listed=listed is not None), "val")
    if train.classes != val.classes:
        only_train = sorted(set(train.classes) - set(val.classes))
        only_val = sorted(set(val.classes) - set(train.classes))
        raise DataError(
            f"{where.root}: expected the same classes in train and val, found {len(only_train)} only in train "
            f"{only_train[:3]} and {len(only_val)} only in val {only_val[:3]}. {_GET[where.dataset]}"
        )
    return train, val


def open_validation_alone(where: Where, classes: Sequence[str] | None) -> Source:
    """Opens the validation split, of which nothing but its images need be there.

    Args:
        where: in the place of validation, or, where there is none, in ROOT itself.
        classes: those that networks were trained on, in the order of labels; None if nobody knows.

    Raises:
        DataError: as `open_photos`.
    """
    where, listed = _listed(where)
    return _under(where, listed, _open(where, "val", listed or classes, listed=listed is not None, alone=True), "val")


def _listed(where: Where) -> tuple[Where, tuple[str, ...] | None]:
    """The classes that a file lists: data.classes, or classes.txt beside shards."""
    beside = where.root / "classes.txt"
    if where.classes is None and where.dataset == "webdataset" and beside.is_file():
        where = replace(where, classes=beside)
    return where, read_classes(where.classes) if where.classes else None


def _under(where: Where, listed: tuple[str, ...] | None, source: Source, split: str) -> Source:
    """The source with the labels that `data.classes` gives to its classes."""
    if listed is None or where.classes is None or source.classes == listed:
        return source
    return source.relabelled(listed, ordered(source.classes, listed, where.classes, split))


def _open(where: Where, split: str, classes: Sequence[str] | None, *, listed: bool, alone: bool = False) -> Source:
    """One split.

    Args:
        split: train or val.
        classes: known ones, in the order of labels.
        listed: whether `data.classes` lists them.
        alone: it may be all that is there.
    """
    own = split == "val" and where.val_root is not None
    root = where.val_root if own and where.val_root else where.root
    if not root.is_dir():
        raise DataError(f"{'val_root' if own else 'root'}: {root} is not a folder. {_GET[where.dataset]}")
    if where.dataset == "hub":
        found = hub.HubSet(root, split, alone=own or alone, cache=where.cache, label_column=where.label_column)
        return hub.known(classes, found)
    labels_file = where.val_labels if split == "val" else None
    if where.dataset == "webdataset":
        shards = shards_of(root, split, alone=own or alone, links=where.links)
        return TarShards(
            shards, root, cache=where.cache, split=split, classes=classes, listed=listed, labels_file=labels_file
        )
    folder = root / split
    if (own or alone) and not folder.is_dir():
        folder = root
    if labels_file:
        return FlatFolder(folder, labels_file, classes, listed=listed, root=root, links=where.links)
    return class_folders.list_split(folder, root, links=where.links, cache=where.cache, split=split)

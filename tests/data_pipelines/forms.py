"""The same photos in other forms than class folders."""

import io
import json
import tarfile
from collections.abc import Mapping, Sequence
from pathlib import Path

import datasets


def samples_of(root: Path, split: str) -> list[tuple[str, int, Path]]:
    """(class, label, file) of each photo of ROOT/SPLIT/CLASS/*, in the order of ids."""
    folders = sorted(path for path in (root / split).iterdir())
    return [(folder.name, label, path) for label, folder in enumerate(folders) for path in sorted(folder.iterdir())]


def write_tar(path: Path, members: Mapping[str, bytes]) -> None:
    """Writes a tar file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w") as tar:
        for name, content in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))


def write_shards(root: Path, to: Path, per_shard: int = 4, pattern: str = "{split}/{split}-{number:06d}.tar") -> None:
    """Packs class folders as the Hub ships ImageNet: WNID_NUMBER.jpg, .cls and .json, in the order of ids."""
    for split in ("train", "val"):
        photos = samples_of(root, split)
        for number, begin in enumerate(range(0, len(photos), per_shard)):
            members: dict[str, bytes] = {}
            for name, label, path in photos[begin : begin + per_shard]:
                key = f"{name}_{path.stem}"
                members[f"{key}{path.suffix.lower()}"] = path.read_bytes()
                members[f"{key}.cls"] = str(label).encode()
                members[f"{key}.json"] = json.dumps({"filename": path.name, "label": label}).encode()
            write_tar(to / pattern.format(split=split, number=number), members)


def bytes_of(photos: Sequence[tuple[str, int, Path]]) -> list[bytes]:
    """What is in the files."""
    return [path.read_bytes() for _, _, path in photos]


def rows_of(root: Path, split: str) -> datasets.Dataset:
    """The photos of a split as a data set of the Hub, in the order of ids."""
    photos = samples_of(root, split)
    features = datasets.Features(
        {"image": datasets.Image(), "label": datasets.ClassLabel(names=sorted({name for name, _, _ in photos}))}
    )
    images = [{"bytes": path.read_bytes(), "path": path.name} for _, _, path in photos]
    table = {"image": images, "label": [label for _, label, _ in photos]}
    return datasets.Dataset.from_dict(table, features=features)


def write_parquet(root: Path, to: Path) -> None:
    """Two Parquet files a split, as the Hub ships ImageNet."""
    (to / "data").mkdir(parents=True)
    for split, name in (("train", "train"), ("val", "validation")):
        rows = rows_of(root, split)
        for part in range(2):
            path = to / f"data/{name}-{part:05d}-of-00002.parquet"
            rows.shard(2, part, contiguous=True).to_parquet(str(path))


def write_arrow(root: Path, to: Path) -> None:
    """What save_to_disk writes, two files a split."""
    splits = {name: rows_of(root, split) for split, name in (("train", "train"), ("val", "validation"))}
    datasets.DatasetDict(splits).save_to_disk(str(to), num_shards={"train": 2, "validation": 2})

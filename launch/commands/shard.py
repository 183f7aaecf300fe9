"""What launch/shard.py does, once its words are read."""

from __future__ import annotations

import argparse
from dataclasses import asdict
from pathlib import Path

from tqdm import tqdm

from data_pipelines import DataError
from data_pipelines.damage import Damaged
from data_pipelines.preparing.packing import Packing, pack, write_classes
from data_pipelines.sources.contract import Source
from data_pipelines.sources.folders.class_folders import list_split
from data_pipelines.sources.labels import ordered, read_classes
from engine.config import ConfigError
from engine.files import write_json
from launch.entry import user_errors

_SHOWN = 20


def run(options: argparse.Namespace) -> None:
    """Packs what can be read, and names the rest."""
    how = Packing(
        options.per_shard,
        options.shuffle is not None,
        options.shuffle or 0,
        options.shorter_side,
        options.quality,
        options.verify,
    )
    with user_errors():
        try:
            left, total = _pack(options.folder, options.out, options.classes, options.links, how, options.threads)
        except DataError as error:
            raise ConfigError(str(error)) from None
        for damaged in left[:_SHOWN]:
            print(f"{damaged.path}: {damaged.reason}")
        if len(left) > _SHOWN:
            print(f"... and {len(left) - _SHOWN} more; --json FILE has them all")
        print(f"{options.out}: {total - len(left):,} photos packed, {len(left):,} that cannot be read left out")
        if options.json:
            write_json(options.json, [asdict(damaged) for damaged in left])
    if left:
        raise SystemExit(1)


def _pack(
    folder: Path, out: Path, listed: Path | None, links: str, how: Packing, threads: int
) -> tuple[list[Damaged], int]:
    """What cannot be read, and how many photos there are. Raises: DataError."""
    splits = {split: folder / split for split in ("train", "val") if (folder / split).is_dir()}
    if not splits:
        raise DataError(f"{folder}: expected a folder train or val with a folder for each class, found neither")
    sources: dict[str, Source] = {}
    for split, path in splits.items():
        source: Source = list_split(path, folder, links="anywhere" if links == "anywhere" else "inside", split=split)
        if listed is not None:
            classes = read_classes(listed)
            source = source.relabelled(classes, ordered(source.classes, classes, listed, split))
        sources[split] = source
        print(*source.remarks, sep="\n", end="\n" * bool(source.remarks))
    if len({source.classes for source in sources.values()}) > 1:
        raise DataError(f"{folder}: expected the same classes in train and val; --classes FILE may list those of both")
    out.mkdir(parents=True, exist_ok=True)
    write_classes(out / "classes.txt", next(iter(sources.values())).classes)
    total = sum(map(len, sources.values()))
    left: list[Damaged] = []
    with tqdm(total=total, unit=" photos", disable=None) as bar:
        for split, source in sources.items():
            left += pack(source, split, out, how, threads, bar.update)
    return left, total

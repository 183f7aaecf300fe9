"""Packs class folders into tar shards: few large files in the place of a million small ones.

    python launch/shard.py /data/imagenet /data/imagenet-shards
    python launch/shard.py /data/imagenet /scratch/imagenet-256 --shorter-side 256 --quality 95 --verify --threads 16

FOLDER holds train/CLASS/* and val/CLASS/*, or one of them. OUT gets train/train-000000.tar, val/val-000000.tar and so
on, and classes.txt; `data.dataset=webdataset data.root=OUT` trains on it, and webdataset reads it too. The samples lie
in the order of their ids unless they are shuffled, for which only readers that take one after another have a use.
The command may be stopped, and goes on when it is started again. Photos that cannot be read are left out and named.
"""

from __future__ import annotations

import os
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
from engine.ranks.collectives import Launch
from launch.entry import parser, user_errors

EPILOG = (
    "Exit codes: 0 all photos are packed; 1 some cannot be read, or it failed; 2 a mistake in the folders or options."
)
_SHOWN = 20


def main() -> None:
    """The command."""
    arguments = parser(__doc__ or "", EPILOG)
    arguments.add_argument("folder", type=Path, metavar="FOLDER", help="train/CLASS/* and val/CLASS/*")
    arguments.add_argument("out", type=Path, metavar="OUT", help="where the shards go")
    arguments.add_argument("--per-shard", type=int, default=1000, metavar="N", help="photos of a shard (1000)")
    arguments.add_argument("--shorter-side", type=int, metavar="PIXELS", help="make larger photos so small (bicubic)")
    arguments.add_argument("--quality", type=int, metavar="Q", help="of JPEGs that are written anew (95 if resized)")
    arguments.add_argument("--verify", action="store_true", help="decode each photo as a whole first")
    arguments.add_argument("--shuffle", type=int, metavar="SEED", help="in a shuffled order (that of ids)")
    arguments.add_argument("--classes", type=Path, metavar="FILE", help="the classes in the order of labels")
    arguments.add_argument("--links", choices=("inside", "anywhere"), default="inside", help="where links may lead")
    arguments.add_argument("--threads", type=int, default=os.cpu_count() or 1, metavar="N", help="shards at a time")
    arguments.add_argument("--json", type=Path, metavar="FILE", help="also write all that cannot be read there")
    options = arguments.parse_args()
    for name, most in (("per_shard", None), ("threads", None), ("shorter_side", None), ("quality", 100)):
        value = getattr(options, name)
        if value is not None and not 1 <= value <= (most or value):
            bound = f"1 to {most}" if most else "1 or more"
            arguments.error(f"--{name.replace('_', '-')} {value}: expected {bound}")
    how = Packing(
        options.per_shard,
        options.shuffle is not None,
        options.shuffle or 0,
        options.shorter_side,
        options.quality,
        options.verify,
    )
    with user_errors(Launch(0, 0, 1)):
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


if __name__ == "__main__":
    main()

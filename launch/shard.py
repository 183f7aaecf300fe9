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
from pathlib import Path

from launch.parsing import parser
from launch.with_parent import importing

EPILOG = (
    "Exit codes: 0 all photos are packed; 1 some cannot be read, or it failed; 2 a mistake in the folders or options."
)


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
    # Not before: torch takes seconds to import.
    with importing():
        from launch.commands.shard import run

    run(options)


if __name__ == "__main__":
    main()

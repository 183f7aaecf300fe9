"""Looks at every file of a run's data set, before a run meets those that cannot be read.

    python launch/doctor.py configs/imagenet/dml_resnet50.yaml data.root=/data/imagenet --threads 16 --json damaged.json

Each file is read and decoded as a whole, several at a time, and what is wrong with it is said: that it is gone, empty,
cut short, no image, or damaged within. A run would show another of its class in its place (data.on_error).
"""

from __future__ import annotations

import os
from collections import Counter
from dataclasses import asdict
from pathlib import Path

from tqdm import tqdm

from data_pipelines.preparing.verifying import count, verify
from engine.config import ConfigError
from engine.config import loading as configuration
from engine.files import write_json
from engine.preflight import check_data
from engine.ranks.collectives import Launch
from launch.entry import parser, user_errors

EPILOG = "Exit codes: 0 all files can be read; 1 some cannot, or it failed; 2 a mistake in the config or the data."
_SHOWN = 20


def main() -> None:
    """The command."""
    arguments = parser(__doc__ or "", EPILOG)
    arguments.add_argument("config", metavar="CONFIG", help="a YAML file, such as those in configs/")
    arguments.add_argument("overrides", nargs="*", metavar="section.key=value", help="values over those of the file")
    arguments.add_argument("--threads", type=int, default=os.cpu_count() or 1, metavar="N", help="files at a time")
    arguments.add_argument("--json", type=Path, metavar="FILE", help="also write all that was found there")
    options = arguments.parse_args()
    if options.threads < 1:
        arguments.error(f"--threads {options.threads}: expected a number of threads, 1 or more")
    with user_errors(Launch(0, 0, 1)):
        config = configuration.load(options.config, options.overrides)
        if not config.data.photos:
            raise ConfigError(
                f"data.dataset = {config.data.dataset}: is read and checked as a whole at each start; only the files "
                "of data sets of photos are looked at one by one"
            )
        check_data(config)
        total = count(config.data.where)
        looked = tqdm(verify(config.data.where, options.threads), total=total, unit=" files", disable=None)
        found = [damaged for damaged in looked if damaged is not None]
        for damaged in found[:_SHOWN]:
            print(f"{damaged.path}: {damaged.reason}")
        if len(found) > _SHOWN:
            print(f"... and {len(found) - _SHOWN} more; --json FILE has them all")
        by_split = Counter(damaged.split for damaged in found)
        parts = ", ".join(f"{by_split[split]:,} of {split}" for split in ("train", "val"))
        print(f"{total:,} files, {len(found):,} that cannot be read: {parts}")
        if options.json:
            write_json(options.json, [asdict(damaged) for damaged in found])
    if found:
        raise SystemExit(1)


if __name__ == "__main__":
    main()

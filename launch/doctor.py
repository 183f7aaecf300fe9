"""Looks at a machine and at the data before a run is started on them.

    python launch/doctor.py configs/imagenet/dml_resnet50.yaml data.root=/data/imagenet
    torchrun --nnodes=2 --nproc-per-node=8 ... launch/doctor.py CONFIG    clocks and exchange of all nodes too
    python launch/doctor.py CONFIG --files --threads 16 --json damaged.json

What there is of cores, memory, GPUs and libraries; how fast ranks talk to each other, by NCCL or gloo; how many photos
a second the storage gives, the decoder decodes and the peers train on, and so what the run would wait for. With --files
every file is read and decoded as a whole, several at a time, and what is wrong with it is said: that it is gone, empty,
cut short, no image, or damaged within. A run would show another of its class in its place (data.on_error).
"""

from __future__ import annotations

import launch.with_parent  # noqa: F401  # isort: skip

import os
from pathlib import Path

from launch.parsing import parser
from launch.with_parent import importing

EPILOG = "Exit codes: 0; 1 some files cannot be read, or it failed; 2 a mistake in the config or the data."


def main() -> None:
    """The command."""
    arguments = parser(__doc__ or "", EPILOG)
    arguments.add_words("CONFIG", "a YAML file, such as those in configs/, or the folder of a run")
    arguments.add_argument("--files", action="store_true", help="look at every file of the data set, and nothing else")
    arguments.add_argument("--threads", type=int, default=os.cpu_count() or 1, metavar="N", help="--files: at a time")
    arguments.add_argument("--json", type=Path, metavar="FILE", help="--files: also write all that was found there")
    options, chosen, overrides = arguments.parse_words()
    if chosen is None:
        arguments.error("CONFIG is missing; expected a YAML file, such as configs/imagenet/dml_resnet50.yaml")
    if options.threads < 1:
        arguments.error(f"--threads {options.threads}: expected a number of threads, 1 or more")
    # Not before: torch takes seconds to import.
    with importing():
        from launch.commands.doctor import run

    run(options, chosen, overrides)


if __name__ == "__main__":
    main()

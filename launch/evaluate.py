"""Scores a cohort on the validation split: each peer, its moving average and the ensemble.

Alone:           python launch/evaluate.py runs/quickstart-dml
On 8 ranks:      torchrun --nproc-per-node=8 launch/evaluate.py runs/imagenet-dml --checkpoint best
On other files:  python launch/evaluate.py runs/imagenet-dml data.root=/mnt/imagenet-v2

With every image:  python launch/evaluate.py runs/imagenet-dml --predictions predictions.csv

Every image is counted exactly once, whatever the number of ranks. Other files are ROOT/val/CLASS/* or ROOT/CLASS/*,
or with data.dataset= any other form of docs/data.md, of which nothing but the validation split need be there; their
classes are those of the run by name, or folders 0, 1, 2, ... as ImageNetV2 has them.
"""

from __future__ import annotations

import launch.with_parent  # noqa: F401  # isort: skip

from pathlib import Path

from launch.parsing import parser
from launch.with_parent import importing

_FILES = {
    "predictions": "what each network names for each image, and with which probability",
    "per-class": "the accuracy of each class",
    "confusion": "how many images of which class were taken for which",
}


def main() -> None:
    """The command."""
    arguments = parser(__doc__ or "", "")
    arguments.add_words("RUN", "a run's folder")
    arguments.add_argument("--checkpoint", default="newest", metavar="WHICH", help="newest (default), best or a step")
    arguments.add_argument("--json", type=Path, metavar="FILE", help="write the scores there as well")
    for name, what in _FILES.items():
        arguments.add_argument(f"--{name}", type=Path, metavar="FILE", help=f"write {what}: .csv or .jsonl")
    options, chosen, overrides = arguments.parse_words()
    if chosen is None:
        arguments.error("RUN is missing; expected the folder of a run")
    # Not before: torch takes seconds to import.
    with importing():
        from launch.commands.evaluate import run

    files = {name: path for name in _FILES if (path := getattr(options, name.replace("-", "_"))) is not None}
    run(options, Path(chosen), overrides, files)


if __name__ == "__main__":
    main()

"""Foretells how a run would do on GPUs that need not be here, and chooses where its peers should live.

    python launch/plan.py configs/imagenet/kdcl_resnet50_resnet18.yaml --gpus 64 --per-node 8 --gpu h100
    python launch/plan.py CONFIG --gpus 64 --measure            peers are timed here, on this device
    python launch/plan.py CONFIG --gpus 64 --yaml               the placement alone, to paste into a config

For each placement: what a rank holds in memory (of a step rehearsed without numbers); a step split into compute,
averaging of gradients that no backward pass hides, exchange of signals, waiting for the slowest rank, and decoding that
is behind; bytes on the wire; images a second, GPU hours of the run, and how near that is to peers computed without any
rest. What is behind the figures, and how far they can be trusted: docs/scaling.md.
"""

from __future__ import annotations

import launch.with_parent  # noqa: F401  # isort: skip

from engine.ranks.planning.hardware import GPUS
from launch.parsing import parser
from launch.with_parent import importing


def main() -> None:
    """The command."""
    arguments = parser(__doc__ or "", "")
    arguments.add_words("CONFIG", "a YAML file, such as those in configs/, or the folder of a run")
    arguments.add_argument("--gpus", type=int, required=True, metavar="N", help="ranks, one a GPU")
    arguments.add_argument("--per-node", type=int, default=8, metavar="M", help="GPUs of a node (default: 8)")
    arguments.add_argument("--gpu", default="h100", metavar="NAME", help=f"one of {', '.join(GPUS)} (default: h100)")
    arguments.add_argument("--measure", action="store_true", help="time the peers here instead of counting operations")
    arguments.add_argument("--yaml", action="store_true", help="print the chosen placement alone, as YAML")
    options, chosen, overrides = arguments.parse_words()
    if chosen is None:
        arguments.error("CONFIG is missing; expected a YAML file, such as configs/imagenet/dml_resnet50.yaml")
    # Not before: torch takes seconds to import.
    with importing():
        from launch.commands.plan import run

    run(options, chosen, overrides)


if __name__ == "__main__":
    main()

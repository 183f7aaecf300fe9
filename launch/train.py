"""Trains a cohort.

Alone:                python launch/train.py configs/fashion_mnist/dml_resnet32.yaml
On 8 GPUs:            torchrun --nproc-per-node=8 launch/train.py configs/imagenet/dml_resnet50.yaml
One peer of several:  ... placement.peer=NAME, each in a job of its own, where placement.kind is jobs
With other values:    ... train.epochs=10 optimizer.lr=0.05 peers.0.network=cifar_resnet32_b
Going on by a folder: python launch/train.py runs/NAME, wherever it lies

The run's folder (runs/NAME, or dir=...) holds the resolved config, metrics.jsonl, checkpoints, a table and curves.png.
A run that was killed goes on from its newest whole checkpoint when it is started again, on any number of ranks.
"""

from __future__ import annotations

import launch.with_parent as at_start  # isort: skip

if __name__ == "__main__":
    at_start.note_signals()

from pathlib import Path

from launch.parsing import parser

EPILOG = """\
Every key, with what it means:  launch/train.py --keys
SIGUSR1, SIGTERM, SIGHUP (a terminal that closes) or Ctrl-C, to any rank, saves the step that it is at and ends the run
with 0; the same command goes on from there. Before the first step it saves that, or, while ranks are missing, ends the
wait at once. torchrun passes SIGTERM, SIGHUP and Ctrl-C on; SIGUSR1 to torchrun itself
ends it, and all ranks unsaved. A script tells that from the end of the run by --preempted FILE.

Exit codes: 0 trained to the end, or saved and ended by a signal; 1 failed; 2 a mistake in the config, the data or the
command line; 3 at its end, but the last step could not be saved; 130 ended at once by a second Ctrl-C. torchrun makes 1
of all but 0, and ends with 1 as well if it got the signal itself.
"""


def main() -> None:
    """The command."""
    arguments = parser(__doc__ or "", EPILOG)
    arguments.add_words("CONFIG", "a YAML file, such as those in configs/, or the folder of a run")
    arguments.add_argument("--print-config", action="store_true", help="print the resolved config and end")
    arguments.add_argument("--check", action="store_true", help="check config, data and placement, and end")
    arguments.add_argument(
        "--ranks",
        type=int,
        metavar="N",
        help="with --check: as if on N ranks, of machines with a GPU for each unless device=cpu, not on this machine",
    )
    arguments.add_argument("--keys", action="store_true", help="print every key with its default and meaning, and end")
    arguments.add_argument("--fresh", action="store_true", help="start over; a folder of an earlier run is moved aside")
    arguments.add_argument(
        "--preempted",
        type=Path,
        metavar="FILE",
        help="write the name of the signal there if one ended the run early; without that FILE is not there afterwards",
    )
    options, chosen, overrides = arguments.parse_words()
    if options.keys or options.check or options.print_config:
        at_start.obey_signals()
    if options.ranks is not None and (options.ranks < 1 or not options.check):
        arguments.error(f"--ranks {options.ranks}: expected a number of ranks, 1 or more, together with --check")
    if chosen is None and not options.keys:
        arguments.error("CONFIG is missing; expected a YAML file, such as configs/fashion_mnist/quickstart_dml.yaml")
    # Not before: torch takes seconds to import.
    with at_start.importing():
        from launch.commands.train import print_keys, run

    if chosen is None or options.keys:
        print_keys()
    else:
        run(options, chosen, overrides, at_start.noted)


if __name__ == "__main__":
    main()

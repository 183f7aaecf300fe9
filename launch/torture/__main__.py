"""Disturbs a run at random moments, as often as asked, and compares what it comes to with the same run undisturbed.

    python launch/torture                          20 times, on 3 ranks: equal to the last bit
    python launch/torture --ranks 3 1 2 4          starts on a number of ranks drawn from these: equal to tolerance
    python launch/torture --kills 5 --seed 7       fewer, and others

The run is real: launch/train.py under torchrun, three networks that teach each other by DML on the 12,000 images that
come with Cohort, 100 steps an epoch, with a line of metrics every step and a checkpoint every 10. The disturbances:

    kill a rank           SIGKILL; torchrun starts all ranks again by itself
    kill a rank for good  SIGKILL; torchrun may not, and must end with an error
    SIGTERM to torchrun   the step must be saved, all must end
    SIGUSR1 to a rank     likewise, with exit code 0
    stop a rank           SIGSTOP; the others must name it and end; then all are killed
    kill in a write       SIGKILL to all while a checkpoint is being written
    kill torchrun         SIGKILL; no rank may live on
    full disk             no file can grow (RLIMIT_FSIZE): training must go on and say so; then all are killed
    damage                all are killed, and a file of the newest checkpoint is cut short or has a bit turned
    half a line           all are killed, and metrics.jsonl ends in the middle of a line
    signal storm          SIGUSR1, SIGTERM and SIGHUP to all ranks, every 10 ms until they have ended: the step is saved
    full disk at the end  a signal, and no room for the checkpoint: said, with exit code 3; or saved once there is room
    second start          of the same run, with --fresh or without: refused, and the first trains on
    cut off               all stop, as if on a machine that nobody sees; the next start takes over after 30 s; then they
                          go on, find that they have lost the folder, and must end without writing
    other data            all are killed, a label is changed: refused; then it is as it was
    skewed ranks          all are killed, one rank is given another value of the config: refused

With --folder a campaign that was ended, by Ctrl-C too, goes on where it was if the same command is given again.

Each comes up once before any comes up again. After each one the lines of metrics must be those of the undisturbed run,
without gap or repeat, and every checkpoint whole but the one that was damaged.

That every sample is seen exactly once an epoch follows from two things that are checked: the order is a function of the
step alone and shows each sample once an epoch (drawn here from the pipeline itself), and the losses of each step are
those of the undisturbed run, bit for bit, or to tolerance on other ranks, which no other samples would give.

On one number of ranks the networks are ResNets with BatchNorm. BatchNorm sees the rows of one rank, so where the number
of ranks changes they are small transformers, and slow learners: rounding grows with every step of a restless network.
"""

from __future__ import annotations

import sys
from pathlib import Path

from launch.parsing import parser, positive

EPILOG = "Exit codes: 0 all is as if nothing had happened, 1 something is not, 2 a mistake in the command line."


def main() -> None:
    """The command."""
    arguments = parser(__doc__ or "", EPILOG)
    arguments.add_argument("--kills", type=positive, default=20, metavar="N", help="disturbances (default: 20)")
    arguments.add_argument(
        "--ranks",
        type=positive,
        nargs="+",
        default=[3],
        metavar="N",
        help="numbers of ranks, of 1 to 4, that starts are drawn from; the undisturbed run has the first (default: 3)",
    )
    arguments.add_argument("--seed", type=int, default=0, help="of kinds, ranks and moments (default: 0)")
    arguments.add_argument(
        "--folder",
        type=Path,
        help="of both runs: new, or of the same command before, which goes on (default: removed if all is well)",
    )
    arguments.add_argument("--keep-going", action="store_true", help="do not end at the first thing that is wrong")
    options = arguments.parse_args()
    # Not before: torch takes seconds to import.
    from launch.torture.experiment import run

    sys.exit(run(options))


if __name__ == "__main__":
    main()

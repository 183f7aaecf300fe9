"""Trains every combination of a sweep file: methods x networks x overrides x seeds, a run folder each.

One after another:     python launch/sweep.py configs/tables/quickstart.yaml
Several at a time:     ... --jobs 4        (cores and GPUs are shared out between them)
Only some:             ... --only 'dml-*' seeds=0,1 train.epochs=2
On a Slurm cluster:    ... --slurm --time=08:00:00        (what follows --slurm goes to slurm/submit.sh)
Checked, not run:      ... --check
How far it is:         ... --show
Compared:              python launch/report.py runs/SWEEP

The same command goes on where it was: runs that are complete are not run again, those that were interrupted go on from
their checkpoints, those that have failed are shown with the last line of their error, and run again with --retry.
The sweep's folder (runs/SWEEP) holds the runs' folders, cells/ (the config of each) and logs/ (what each printed).
"""

from __future__ import annotations

import sys

from launch.parsing import parser
from launch.with_parent import importing

EPILOG = """\
Exit codes: 0 all runs are complete (or submitted, checked, shown); 1 some are not: failed, or in use elsewhere; 2 a
mistake in the sweep file, before anything is started; 130 interrupted: the same command goes on.
"""


def main() -> None:
    """The command."""
    arguments = parser(__doc__ or "", EPILOG)
    arguments.add_words("SWEEP", "a sweep file, such as those in configs/tables/; seeds=0,1,2 instead of its own")
    arguments.add_argument("--jobs", type=int, default=1, metavar="N", help="runs at a time (1)")
    arguments.add_argument("--only", metavar="PATTERN", help="only runs whose names match, such as 'dml-*-seed0'")
    arguments.add_argument("--retry", action="store_true", help="run those again that have failed")
    arguments.add_argument("--check", "--dry-run", action="store_true", help="check and list all runs, and end")
    arguments.add_argument("--show", action="store_true", help="show how far each run is, and end")
    given = sys.argv[1:]
    slurm = given[given.index("--slurm") + 1 :] if "--slurm" in given else None
    sys.argv[1:] = given[: given.index("--slurm")] if slurm is not None else given
    arguments.add_argument("--slurm", action="store_true", help="submit an array; options of sbatch follow, to the end")
    options, chosen, overrides = arguments.parse_words()
    if chosen is None:
        arguments.error("SWEEP is missing; expected a YAML file, such as configs/tables/quickstart.yaml")
    if options.jobs < 1:
        arguments.error(f"--jobs {options.jobs}: expected a number of runs at a time, 1 or more")
    # Not before: torch takes seconds to import.
    with importing():
        from launch.commands.sweep import run

    run(options, chosen, overrides, slurm)


if __name__ == "__main__":
    main()

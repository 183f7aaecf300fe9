"""Puts runs side by side: what each came to, and what methods gain over networks that train alone.

    python launch/report.py runs/quickstart-independent runs/quickstart-dml --out runs/quickstart
    python launch/report.py runs/SWEEP                            (all runs of a sweep, into runs/SWEEP/report.*)

Writes OUT.html, one page that loads nothing, OUT.md, OUT.csv (every figure of every run), OUT.png and OUT.txt, and
prints the table. Runs are put in rows by method, over their seeds, and in groups by network and data; those of a group
have to be of one recipe, or are refused with what differs.
"""

from __future__ import annotations

from pathlib import Path

from launch.parsing import parser
from launch.with_parent import importing


def main() -> None:
    """The command."""
    arguments = parser(__doc__ or "", "")
    arguments.add_argument("runs", nargs="+", type=Path, metavar="RUN", help="folders of runs, or of sweeps")
    arguments.add_argument("--out", type=Path, metavar="OUT", help="path of the files, without suffix")
    arguments.add_argument("--title", help="of the page (the name of the sweep)")
    arguments.add_argument(
        "--may-differ",
        action="append",
        default=[],
        metavar="KEY",
        help="a key, such as data.sampler, or a section in which runs may differ; reported beside the numbers",
    )
    options = arguments.parse_args()
    # Not before: torch takes seconds to import.
    with importing():
        from launch.commands.report import run

    run(options)


if __name__ == "__main__":
    main()

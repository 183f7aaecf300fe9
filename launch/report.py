"""Puts runs side by side: one table, and one picture of their curves.

    python launch/report.py runs/quickstart-independent runs/quickstart-dml --out runs/quickstart

Writes OUT.txt and OUT.png, and prints the table.
"""

from __future__ import annotations

from pathlib import Path

from engine.files import write_text
from engine.ranks.collectives import Launch
from engine.reporting import report
from launch.entry import parser, user_errors


def main() -> None:
    """The command."""
    arguments = parser(__doc__ or "", "")
    arguments.add_argument("runs", nargs="+", type=Path, metavar="RUN", help="folders of runs")
    arguments.add_argument("--out", type=Path, required=True, metavar="OUT", help="path of the files, without suffix")
    options = arguments.parse_args()
    with user_errors(Launch.from_environment()):
        text = report.table(options.runs)
        write_text(options.out.with_name(options.out.name + ".txt"), text + "\n")
        picture = options.out.with_name(options.out.name + ".png")
        report.curves(options.runs, picture)
        runs = "\n".join(f"{run}" for run in options.runs)
        print(f"{text}\n\npicture: {picture}\nruns:\n{runs}")


if __name__ == "__main__":
    main()

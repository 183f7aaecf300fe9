"""Looks after the checkpoints of a run.

    python launch/checkpoint.py ls RUN                          which there are, and whether their files are all there
    python launch/checkpoint.py verify RUN                      compares every byte with the SHA-256 it was written with
    python launch/checkpoint.py show RUN --checkpoint best      what is in it: every tensor, shape, format and number
    python launch/checkpoint.py prune RUN --keep 1 --dry-run    frees room, beside what checkpoint.keep does of itself

Nothing in a checkpoint is executed. prune keeps the best and the newest that are whole, and removes what is damaged
only where something whole stays. It may run beside training: what is being written at the moment is left alone.
"""

from __future__ import annotations

import signal
import sys
from pathlib import Path

from launch.parsing import parser, positive
from launch.with_parent import importing

EPILOG = "Exit codes: 0 all is well, 1 verify has found damage, 2 a mistake in the command line, or show cannot read."

_COMMANDS = {
    "ls": "lists a run's checkpoints; whole means that all files have their sizes, verify looks closer",
    "verify": "compares all files of checkpoints with their SHA-256; exit code 1 where one is damaged",
    "show": "prints what is in a checkpoint: its manifest, and the tensors of each file",
    "prune": "removes all checkpoints but the newest whole ones and the best, and what kills left behind",
}


def main() -> None:
    """The command."""
    arguments = parser(__doc__ or "", EPILOG)
    commands = arguments.add_subparsers(dest="command", required=True, metavar="ls|verify|show|prune")
    for name, does in _COMMANDS.items():
        command = commands.add_parser(name, help=does, description=does, allow_abbrev=False)
        command.add_argument("run", type=Path, metavar="RUN", help="a run's folder")
        if name in ("verify", "show"):
            default = "all" if name == "verify" else "newest"
            text = "newest, best or a step (default: %(default)s)"
            command.add_argument("--checkpoint", default=default, metavar="WHICH", help=text)
        if name == "prune":
            command.add_argument("--keep", type=positive, required=True, metavar="N", help="newest that stay")
            command.add_argument("--dry-run", action="store_true", help="only say what would be removed")
    options = arguments.parse_args()
    # Not before: torch takes seconds to import.
    with importing():
        from launch.commands.checkpoint import run

    sys.exit(run(options))


if __name__ == "__main__":
    signal.signal(signal.SIGPIPE, signal.SIG_DFL)  # ... | head
    main()

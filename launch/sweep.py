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

import os
import signal
import subprocess
import sys
from collections.abc import Iterator, Sequence
from fnmatch import fnmatchcase
from pathlib import Path

from engine.config import ConfigError
from engine.config.grid import Cell, Grid, cells_of, read_grid, said_of
from engine.preflight import check_run
from engine.ranks.collectives import Launch
from launch.entry import parser, user_errors
from launch.sweeping import cells as on_disk
from launch.sweeping.processes import Pool
from launch.sweeping.table import Table, as_text

ROOT = Path(__file__).parents[1]

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
    arguments.add_argument("--slurm", action="store_true", help="submit arrays; options of sbatch follow, to the end")
    options, chosen, overrides = arguments.parse_words()
    if chosen is None:
        arguments.error("SWEEP is missing; expected a YAML file, such as configs/tables/quickstart.yaml")
    if options.jobs < 1:
        arguments.error(f"--jobs {options.jobs}: expected a number of runs at a time, 1 or more")
    with user_errors(Launch.from_environment()):
        path = Path(chosen)
        grid, cells = _read(path, overrides, options.only)
        if not options.show:
            check(cells, grid.ranks if slurm is None else None)
        if options.check:
            print(f"{len(cells)} runs in {grid.folder}, {grid.ranks} process{'es' * (grid.ranks > 1)} each")
            print(*(_in_words(cell) for cell in cells), sep="\n")
            return
        if options.show:
            print(as_text([(cell.name, on_disk.standing(grid.folder, cell)) for cell in cells]))
            return
        on_disk.write_down(grid, cells)
        if slurm is not None:
            sys.exit(_submit(grid, cells, slurm, retry=options.retry))
        sys.exit(_train(grid, cells, options.jobs, retry=options.retry))


def _read(path: Path, words: Sequence[str], only: str | None) -> tuple[Grid, list[Cell]]:
    seeds = [word.removeprefix("seeds=") for word in words if word.startswith("seeds=")]
    numbers = None
    if seeds:
        if not all(number.isdecimal() for number in seeds[-1].split(",")):
            raise ConfigError(f"seeds = {seeds[-1]!r}: expected numbers, such as seeds=0,1,2")
        numbers = [int(number) for number in seeds[-1].split(",")]
    grid = read_grid(path, numbers)
    cells = cells_of(grid, path, [word for word in words if not word.startswith("seeds=")])
    chosen = [cell for cell in cells if only is None or fnmatchcase(cell.name, only)]
    if not chosen:
        raise ConfigError(f"--only {only}: no run of that name; they are {', '.join(cell.name for cell in cells)}")
    return grid, chosen


def check(cells: Sequence[Cell], ranks: int | None) -> None:
    """Looks at each run as `launch/train.py --check` does, before the first is started.

    Args:
        ranks: processes of a run; None where slurm/submit.sh will look, which knows them.

    Raises:
        ConfigError: a line for each mistake, with the runs that have it.
    """
    wrong: dict[str, list[str]] = {}
    for cell in cells if ranks is not None else ():
        try:
            check_run(cell.config, Launch(0, 0, ranks or 1))
        except ConfigError as error:
            for line in str(error).splitlines():
                wrong.setdefault(line, []).append(cell.name)
    if wrong:
        raise ConfigError("\n".join(said_of(names, line) for line, names in wrong.items()))


def _in_words(cell: Cell) -> str:
    peers = ", ".join(f"{peer.network}{f' x {peer.copies}' if peer.copies > 1 else ''}" for peer in cell.config.peers)
    train = cell.config.train
    length = f"{train.max_steps} steps" if train.max_steps else f"{train.epochs} epochs"
    return f"  {cell.name}: {cell.config.method.name}; {peers}; {length}"


def _train(grid: Grid, cells: Sequence[Cell], jobs: int, *, retry: bool) -> int:
    """Returns: the exit code."""
    pool, stopped = Pool(grid, jobs), list[int]()

    def stop(number: int, _: object) -> None:
        stopped.append(number)
        pool.stop()

    before = {number: signal.signal(number, stop) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)}
    table = Table(grid.folder, cells)
    try:
        waiting = list(_to_do(grid, cells, table, retry=retry))
        table.begin()
        while waiting or pool.busy:
            while waiting and pool.has_room and not stopped:
                cell = waiting.pop(0)
                pool.start(cell)
                table.started(cell, on_disk.log_of(grid.folder, cell))
            if stopped:
                waiting.clear()
            for cell, failure in pool.ended(1.0):
                on_disk.set_failure(grid.folder, cell, failure)
                table.ended(cell, failure)
            table.show()
    finally:
        pool.close()
        for number, action in before.items():
            signal.signal(number, action)
    complete = table.end()
    if stopped:
        print("interrupted; the same command goes on", file=sys.stderr)
        return 130
    return 0 if complete else 1


def _to_do(grid: Grid, cells: Sequence[Cell], table: Table, *, retry: bool) -> Iterator[Cell]:
    """The runs that are to be started; what becomes of the others is said."""
    for cell in cells:
        found = on_disk.standing(grid.folder, cell)
        if found.state in ("waiting", "interrupted") or (found.state == "failed" and retry):
            yield cell
        elif found.state == "running":
            table.say(f"{cell.name}: is trained elsewhere, by {found.said}")
        elif found.state == "failed":
            table.say(f"{cell.name}: has failed: {found.said}; --retry runs it again")


def _submit(grid: Grid, cells: Sequence[Cell], options: Sequence[str], *, retry: bool) -> int:
    """An array for each seed, as slurm/submit.sh makes them. Returns: the exit code."""
    wanted = list(_to_do(grid, cells, Table(grid.folder, cells), retry=retry))
    if not wanted:
        print("all runs are complete, or running")
    environment = {**os.environ, "WANDB_RUN_GROUP": grid.name}
    for seed in dict.fromkeys(cell.seed for cell in wanted):
        configs = [str(on_disk.config_of(grid.folder, cell).absolute()) for cell in wanted if cell.seed == seed]
        command = ["bash", str(ROOT / "slurm" / "submit.sh"), *configs, f"seeds={seed}", *options]
        if code := subprocess.run(command, env=environment, check=False).returncode:
            return code
    print(f"how far they are: python launch/sweep.py ... --show; then python launch/report.py {grid.folder}")
    return 0


if __name__ == "__main__":
    main()

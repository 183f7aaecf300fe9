"""What launch/sweep.py does, once its words are read."""

from __future__ import annotations

import argparse
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
from launch.entry import user_errors
from launch.sweeping import cells as on_disk
from launch.sweeping.processes import Pool
from launch.sweeping.table import Table, as_text

ROOT = Path(__file__).parents[2]


def run(options: argparse.Namespace, chosen: str, overrides: Sequence[str], slurm: Sequence[str] | None) -> None:
    """Trains, submits, checks or shows the runs of a sweep.

    Args:
        options: of the command line.
        chosen: the sweep file.
        overrides: `section.key=value`, and `seeds=0,1`.
        slurm: options of sbatch; None where nothing is submitted.
    """
    with user_errors():
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
    """An array of the runs that are to do, as slurm/submit.sh makes it. Returns: the exit code."""
    configs = [
        str(on_disk.config_of(grid.folder, cell).absolute())
        for cell in _to_do(grid, cells, Table(grid.folder, cells), retry=retry)
    ]
    if not configs:
        print("all runs are complete, or running, or have failed")
        return 0
    command = ["bash", str(ROOT / "slurm" / "submit.sh"), *configs, "seeds=own", *options]
    environment = {**os.environ, "WANDB_RUN_GROUP": grid.name}
    if code := subprocess.run(command, env=environment, check=False).returncode:
        return code
    print(f"how far they are: python launch/sweep.py ... --show; then python launch/report.py {grid.folder}")
    return 0

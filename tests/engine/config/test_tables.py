"""The sweep files that come with the project."""

from __future__ import annotations

from pathlib import Path

import pytest

from engine.config.grid import Grid, cells_of, read_grid
from engine.reporting.report.published import published

TABLES = sorted((Path(__file__).parents[3] / "configs" / "tables").glob("*.yaml"))


def first(grid: Grid, axis: str) -> Grid:
    return grid.model_copy(update={axis: dict(list(getattr(grid, axis).items())[:1])})


@pytest.mark.parametrize("path", TABLES, ids=lambda path: path.stem)
def test_every_method_and_every_network_of_a_table_is_valid(path: Path) -> None:
    grid = read_grid(path, [0])
    assert grid.name in (f"table-{path.stem.replace('_', '-')}", f"{path.stem}-sweep")
    one = first(grid, "overrides")
    cells = [*cells_of(first(one, "networks"), path), *cells_of(first(one, "methods"), path)]
    assert {cell.method for cell in cells} == set(grid.methods)
    assert {cell.network for cell in cells} == set(grid.networks)


@pytest.mark.slow
@pytest.mark.parametrize("path", TABLES, ids=lambda path: path.stem)
def test_every_run_of_a_table_is_valid(path: Path) -> None:
    cells = cells_of(read_grid(path, [0]), path)
    if path.stem.startswith(("pcl", "lmcl_pairs")):
        assert all(published(cell.config) for cell in cells if cell.method != "independent")

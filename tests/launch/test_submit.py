"""slurm/submit.sh up to where Slurm is asked: it counts ranks, and refuses what cannot be run on them."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from engine.config.loading import dump
from tests.runs import small_run

SUBMIT = Path(__file__).parents[2] / "slurm" / "submit.sh"


def submit(at: Path, *arguments: str) -> tuple[int, str]:
    env = {name: value for name, value in os.environ.items() if name != "RANKS_PER_NODE"} | {"PYTHON": sys.executable}
    env["PYTHONPATH"] = str(SUBMIT.parents[1])
    done = subprocess.run(["bash", SUBMIT, *arguments], cwd=at, env=env, capture_output=True, text=True)
    return done.returncode, done.stderr


@pytest.fixture
def at(tiny: Path, tmp_path: Path) -> Path:
    """A folder with my.yaml, whose two peers, one a rank, cannot live on 7 ranks."""
    config = small_run(tiny, tmp_path / "run", placement={"kind": "spread"}, device="cpu")
    (tmp_path / "my.yaml").write_text(dump(config))
    return tmp_path


def test_a_range_of_nodes_is_refused(at: Path) -> None:
    code, said = submit(at, "my.yaml", "--nodes=2-4")
    assert (code, said) == (
        2,
        "error: --nodes=2-4: expected a number of nodes: a run is checked for the ranks that it will have\n",
    )


@pytest.mark.slow
@pytest.mark.parametrize(
    "options",
    [
        ["--nodes=1", "--gres=gpu:7"],
        ["--nodes", "1", "--gres=gpu:a100:7(S:0-1),shard:2"],
        ["-N7", "--gres=gpu"],
        ["--nodes=7", "--gpus-per-node=h100:1"],
    ],
)
def test_ranks_are_counted_however_they_are_asked_for(at: Path, options: list[str]) -> None:
    code, said = submit(at, "my.yaml", *options)
    assert code == 2
    assert said.startswith("error: placement.kind = spread: 2 peers, 1 a rank, need a multiple of 2 ranks, found 7"), (
        said
    )
    assert said.endswith("not submitted\n")


@pytest.mark.slow
def test_a_run_of_an_array_has_a_name_that_a_run_may_have(at: Path) -> None:
    (at / ".hidden").mkdir()
    (at / "my.yaml").rename(at / ".hidden" / "a b.yaml")
    code, said = submit(at / ".hidden", "a b.yaml", "seeds=0,1", "--nodes=1", "--gpus-per-node=2")
    # What could not be done is what comes after the check, where there is no Slurm.
    assert "name" not in said, said
    assert code != 2, said

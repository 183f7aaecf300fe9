"""`launch/bench gpu --quick`: the command that is to run on a machine that is lent for minutes, tried without one."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from launch.bench.gpu.methods import FORMS
from launch.bench.gpu.parts import PARTS
from losses import METHODS

ROOT = Path(__file__).parents[2]


def command(out: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    line = [sys.executable, "launch/bench", "gpu", "--quick", "--out", str(out), *arguments]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "CUDA_VISIBLE_DEVICES": ""}
    return subprocess.run(line, cwd=ROOT, env=environment, capture_output=True, text=True)


def rows(out: Path) -> list[dict[str, object]]:
    return [json.loads(line) for line in (out / "rows.jsonl").read_text().splitlines()]


@pytest.mark.slow
def test_every_part_runs_and_has_its_table(tmp_path: Path) -> None:
    done = command(tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr
    found = rows(tmp_path)
    assert not [row for row in found if row["what"] in ("FAILED", "error")]
    assert {row["part"] for row in found if row["what"] == "whole part"} == set(PARTS)
    assert [row["note"] for row in found if row["part"] == "exchange-nccl" and "note" in row] == ["needs CUDA"]
    compared = {row["what"] for row in found if row["part"] == "methods" and "over independent" in row}
    assert {name.rpartition(",")[0] for name in compared if isinstance(name, str)} == set(FORMS)
    table = (tmp_path / "gpu.md").read_text()
    assert all(f"## {part}: " in table for part in PARTS)


def test_every_method_is_measured() -> None:
    assert {section["name"] for section in FORMS.values()} == set(METHODS) - {"independent"}


def test_a_part_without_time_is_said_to_have_failed_and_rows_of_before_stay(tmp_path: Path) -> None:
    (tmp_path / "rows.jsonl").write_text(
        '{"part": "saving", "run": "earlier", "card": "a card", "at": 1.0, "what": "a save", "ms": 3.0}\n'
    )
    done = command(tmp_path, "--minutes", "0", "--only", "ceilings")
    assert done.returncode == 1
    assert "failed: ceilings" in done.stdout
    table = (tmp_path / "gpu.md").read_text()
    assert "not run: no time is left" in table
    assert "a save" in table

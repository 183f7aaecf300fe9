"""What each method sends at ImageNet's shapes, from the signals of forward passes without numbers."""

from __future__ import annotations

import re
from pathlib import Path

from launch.bench.bytes import bytes_a_step
from losses import METHODS
from tests.worlds import run_world

ROWS, CLASSES, FEATURES, FLOAT = 128, 1000, 2048, 4
WIDTH, MATCH, EXITS, NUMBERED = 128, 128, 4, 8
LOGITS = ROWS * CLASSES * FLOAT
SPECIFIED = {
    "independent": 0,
    "dml": LOGITS,
    "cl_ilr": LOGITS,
    "one": LOGITS,
    "ffl": LOGITS + ROWS * FEATURES * 7 * 7 * FLOAT,
    "okddip": LOGITS + ROWS * FEATURES * FLOAT,
    "kdcl": LOGITS,
    "pcl": LOGITS + ROWS * FEATURES * FLOAT,
    "dcm": LOGITS + ROWS * FLOAT,
    "dcl": 0,
    "codistillation": 0,
    "mcl": ROWS * (WIDTH + NUMBERED) * FLOAT,
    "lmcl": LOGITS + ROWS * (EXITS * (WIDTH + MATCH) + NUMBERED) * FLOAT,
}


def sent() -> dict[str, int]:
    return {method: bytes_a_step(method) for method in METHODS}


def sent_in_other_forms() -> list[int]:
    return [bytes_a_step(method, negatives="batch") for method in ("mcl", "lmcl")]


def test_negatives_of_the_own_rank_need_no_targets_and_ids() -> None:
    [(mcl, lmcl)] = run_world(1, sent_in_other_forms)
    assert (SPECIFIED["mcl"] - mcl, SPECIFIED["lmcl"] - lmcl) == (ROWS * NUMBERED * FLOAT,) * 2


def test_bytes_of_a_step_are_those_of_the_specification_and_of_the_documentation() -> None:
    [found] = run_world(1, sent)
    assert found == SPECIFIED
    text = (Path(__file__).parents[2] / "docs" / "methods.md").read_text(encoding="utf-8")
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in text.splitlines() if line.startswith("| `")]
    assert {row[0].strip("`"): int(row[4].replace(",", "")) for row in rows} == found
    assert {row[0].strip("`"): re.split(r"\W", row[5])[0] for row in rows} == {
        n: m.deployed for n, m in METHODS.items()
    }
    for row in rows:
        assert (Path(__file__).parents[2] / "configs" / f"{row[7].strip('`')}.yaml").is_file(), row[7]

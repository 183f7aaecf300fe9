"""The tests of this room with a CPU in the GPU's place, a few of them, so that they do not rot where there is none."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.gpu.cases import CASES
from tests.gpu.checks import assert_close, assert_learnt, assert_terms_close, whole
from tests.gpu.jobs import JOBS
from tests.gpu.steps import look_at
from tests.marks import slow
from tests.worlds import run_ranks


@pytest.mark.parametrize("case", [slow("dml_accumulation"), slow("mcl_memory")])
def test_a_case(case: str) -> None:
    [found] = run_ranks(1, look_at, CASES[case], "cpu")
    here, cpu = whole(found["device"]), whole(found["cpu"])
    assert_close(here["state"], cpu["state"], 0.0)
    assert_terms_close(here["terms"], cpu["terms"], 0.0)
    assert here["misplaced"] == []
    assert found["waits"] == ""
    for amp in ("bf16", "fp16"):
        assert_learnt(whole(found[amp]))


def test_a_save_beside_training(tiny: Path, tmp_path: Path) -> None:
    found = JOBS["saving"](tiny, tmp_path, "cpu")
    assert (found["damaged"], found["step"], found["moved"]) == ([], 5, True)
    assert_close(found["saved"], found["then"], 0.0)


def test_evaluation(tiny: Path, tmp_path: Path) -> None:
    found = JOBS["evaluation"](tiny, tmp_path, "cpu")
    assert found["device"] == found["cpu"]


@pytest.mark.parametrize("case", ["mcl_batch"])
def test_twins(case: str, tiny: Path, tmp_path: Path) -> None:
    terms = JOBS[f"twins {case}"](tiny, tmp_path, "cpu")
    assert all(abs(x) < 1e-6 for name, x in terms.items() if "soft" in name)

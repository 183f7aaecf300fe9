"""Every method on a GPU: the numbers of the CPU, no waiting, and half precision. Run with `pytest -m gpu tests/gpu`."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from losses import METHODS
from tests.gpu.cases import CASES
from tests.gpu.checks import assert_close, assert_learnt, assert_terms_close, whole

pytestmark = pytest.mark.gpu

Found = Callable[[str], dict[str, Any]]


@pytest.mark.parametrize("case", CASES)
def test_three_steps_equal_those_on_the_cpu(case: str, found: Found) -> None:
    here, cpu = whole(found(case)["device"]), whole(found(case)["cpu"])
    assert_terms_close(here["terms"], cpu["terms"], 5 * CASES[case].tolerance)
    assert_close(here["state"], cpu["state"], CASES[case].tolerance)


@pytest.mark.parametrize("case", CASES)
def test_all_that_is_remembered_lies_with_what_it_belongs_to(case: str, found: Found) -> None:
    assert whole(found(case)["device"])["misplaced"] == []


@pytest.mark.parametrize(
    "case",
    [
        pytest.param(name, marks=[pytest.mark.xfail(reason=case.waits, strict=False)] if case.waits else [])
        for name, case in CASES.items()
    ],
)
def test_the_hot_loop_never_waits_for_the_device(case: str, found: Found) -> None:
    assert found(case)["waits"] == ""


@pytest.mark.parametrize("amp", ["bf16", "fp16"])
@pytest.mark.parametrize("case", CASES)
def test_half_precision_stays_finite_and_learns(case: str, amp: str, found: Found) -> None:
    if amp == "fp16" and not CASES[case].fp16:
        pytest.skip("refused by the config")
    assert_learnt(whole(found(case)[amp]))


def test_every_method_has_a_case() -> None:
    assert {case.method["name"] for case in CASES.values()} == set(METHODS)

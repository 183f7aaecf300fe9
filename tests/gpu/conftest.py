"""Worlds for the tests of this room. They run beside each other: most of their time goes into starting CUDA."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.gpu.cases import CASES
from tests.gpu.jobs import JOBS
from tests.gpu.steps import look_at
from tests.worlds import run_ranks

DEVICE = os.environ.get("COHORT_TEST_DEVICE", "cuda")
"""`cpu` tries the tests themselves: `COHORT_TEST_DEVICE=cpu pytest -m gpu tests/gpu`."""


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Without a GPU, what needs one is skipped."""
    if DEVICE == "cuda" and not torch.cuda.device_count():
        for item in items:
            if item.get_closest_marker("gpu"):
                item.add_marker(pytest.mark.skip(reason="no CUDA device"))


@pytest.fixture(scope="session")
def device() -> str:
    """The device that is compared with the CPU."""
    return DEVICE


@pytest.fixture(scope="session")
def _futures(
    request: pytest.FixtureRequest, tiny: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[dict[str, Future[Any]]]:
    wanted: dict[str, set[str]] = {"case": set(), "job": set()}
    for item in request.session.items:
        parameters = getattr(getattr(item, "callspec", None), "params", {})
        for kind, names in wanted.items():
            if kind in parameters and item.get_closest_marker("gpu"):
                names.add(parameters[kind])
    with ThreadPoolExecutor(max(1, min(8, (os.cpu_count() or 1) // 2))) as pool:
        futures = {
            f"job {name}": pool.submit(job, tiny, tmp_path_factory.mktemp("job"), DEVICE)
            for name, job in JOBS.items()
            if name in wanted["job"]
        }
        futures |= {
            f"case {name}": pool.submit(lambda c=case: run_ranks(1, look_at, c, DEVICE, timeout=150)[0])  # type: ignore[misc]
            for name, case in CASES.items()
            if name in wanted["case"]
        }
        yield futures
        for future in futures.values():
            future.cancel()


@pytest.fixture(scope="session")
def found(_futures: dict[str, Future[Any]]) -> Callable[[str], dict[str, Any]]:
    """What was seen of a case, see `look_at`."""
    return lambda case: _futures[f"case {case}"].result()  # type: ignore[no-any-return]


@pytest.fixture(scope="session")
def done(_futures: dict[str, Future[Any]]) -> Callable[[str], Any]:
    """What a job has given."""
    return lambda job: _futures[f"job {job}"].result()

"""Updates that are captured and replayed, and peers that are computed as one, against ordinary ones."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from engine.training.graphs import WARM, WARM_RANKS, Graphed
from engine.training.step import train_step
from engine.training.timing import Clock
from losses import Progress
from tests.engine.stepping import config_of, state
from tests.gpu.checks import assert_close
from tests.gpu.steps import a_cohort, on_the_device
from tests.worlds import run_world

pytestmark = pytest.mark.gpu

STEPS, OF_EPOCH = 2 * WARM + 4, WARM + 2
"""An update is captured in the first epoch, and anew in the second."""


def trained(
    device: str, method: str, together: str, graphed: bool, steps: int = STEPS
) -> tuple[dict[str, Tensor], list[str], bool]:
    """The state at the end, what was said, and whether the last update was a graph."""
    cohort = a_cohort(config_of({"name": method}, 3, train={"batch_peers": together}), torch.device(device, 0))
    said: list[str] = []
    graphs = Graphed(said.append)
    for step in range(steps):
        batches, progress = on_the_device(cohort, step), Progress(step, OF_EPOCH, 2)
        train_step(cohort, batches, progress, Clock(cohort.device), None, graphs if graphed else None)
    return {name: x.cpu() for name, x in state(cohort).items()}, said, graphs.captured


@pytest.mark.parametrize("together", ["off", "on"])
@pytest.mark.parametrize("method", ["independent", "dml", "kdcl"])
def test_captured_updates_are_the_ordinary_ones(method: str, together: str, device: str) -> None:
    [(plain, _, _)] = run_world(1, trained, device, method, "off", False)
    [(other, said, captured)] = run_world(1, trained, device, method, together, True)
    assert said == []
    assert captured == (device == "cuda")
    assert_close(other, plain, 1e-4)


def test_ranks_that_share_a_gpu_say_why_nothing_is_captured(device: str) -> None:
    """They talk by gloo."""
    for _, said, captured in run_world(2, trained, device, "dml", "off", True, WARM_RANKS + 2):
        assert not captured
        if device == "cuda":
            assert said[0].endswith("one operation after another: ranks talk by gloo, which waits for the host")
        assert len(said) == (device == "cuda")

"""A run goes on with another layout of memory than it has begun with."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor

from engine.cohort.cohort import Cohort
from engine.config import RunConfig
from engine.safety import checkpoint, loading
from engine.safety.checkpoint import Standing
from engine.safety.saving import Saver
from tests.engine.stepping import cohort_of, config_of, do_steps
from tests.worlds import run_world


def state(cohort: Cohort) -> dict[str, Tensor]:
    """Weights and moments of all peers."""
    found = {}
    for k, resident in cohort.residents.items():
        assert resident.optimizer is not None
        for name, p in resident.peer.named_parameters():
            found[f"{k}/{name}"] = p.detach()
            for moment, x in resident.optimizer.state[p].items():
                if isinstance(x, Tensor) and x.shape == p.shape:
                    assert x.stride() == p.stride(), f"{name}: {moment} lies otherwise"
                    found[f"{k}/{name}/{moment}"] = x
    return found


def update(cohort: Cohort) -> None:
    """An update along gradients that are the same in every layout."""
    generator = torch.Generator().manual_seed(0)
    for resident in cohort.residents.values():
        assert resident.optimizer is not None
        for p in resident.parameters:
            p.grad = torch.empty_like(p).copy_(torch.randn(p.shape, generator=generator))
        resident.optimizer.step()


def gone_on(config: RunConfig, folder: Path) -> None:
    cohort, said = cohort_of(config), list[str]()
    do_steps(cohort, range(2))
    saver = Saver(folder, cohort, said.append)
    saver.save(Standing(2, None, 0, {}, 0), keep=9)
    saver.close()
    manifest = loading.verify(checkpoint.folder_of(folder, 2))
    other_way = "off" if config.precision.channels_last == "on" else "on"
    precision = config.precision.model_copy(update={"channels_last": other_way})
    other = cohort_of(config.model_copy(update={"precision": precision}))
    loading.load(folder, manifest, other)
    for one in (lambda _: None, update):
        one(cohort)
        one(other)
        before, after = state(cohort), state(other)
        assert before.keys() == after.keys()
        assert any(x.stride() != after[name].stride() for name, x in before.items())
        for name, x in before.items():
            torch.testing.assert_close(after[name], x, rtol=1e-6, atol=1e-7, msg=name)


@pytest.mark.parametrize("channels_last", ["on", "off"])
@pytest.mark.parametrize("optimizer", ["sgd", "adamw"])
def test_fused_updates_find_moments_where_weights_are(tmp_path: Path, optimizer: str, channels_last: str) -> None:
    """Such an update goes through memory, and asks no tensor for its layout."""
    sections = {"optimizer": {"name": optimizer}, "precision": {"channels_last": channels_last}}
    run_world(1, gone_on, config_of(**sections), tmp_path)

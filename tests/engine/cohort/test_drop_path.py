"""Stochastic depth that changes from epoch to epoch."""

from __future__ import annotations

import pytest
import torch

from engine.cohort.drop_path import drop_paths
from engine.config import ConfigError
from engine.preflight import check_run
from engine.ranks.collectives import Launch
from tests.engine.stepping import STEPS_PER_EPOCH, cohort_of, config_of
from tests.worlds import run_world

PEERS = [
    {"network": "timm/test_convnext", "options": {"drop_path_rate": 0.2}},
    {"network": "cifar_resnet8_b", "options": {"width": 4}},
]


def rates(stages: list[list[float]]) -> list[float]:
    cohort = cohort_of(config_of(peers=PEERS, train={"epochs": 4, "drop_path": stages}))
    last = list(drop_paths(cohort.residents[0].peer))[-1]
    found = []
    for epoch in range(4):
        cohort.begin_step(epoch * STEPS_PER_EPOCH)
        found.append(float(last.drop_prob))  # type: ignore[arg-type]
        cohort.begin_step((epoch + 1) * STEPS_PER_EPOCH - 1)
        assert last.drop_prob == found[-1]
    return found


def test_rates_follow_the_epoch() -> None:
    [found] = run_world(1, rates, [[1, 0.5], [3, 0.0]])
    # timm lets the rate grow linearly with depth, up to drop_path_rate at the last block.
    assert found == pytest.approx([0.2, 0.1, 0.1, 0.0])


def rate_of_a_late_start() -> float:
    cohort = cohort_of(config_of(peers=PEERS, train={"epochs": 4, "drop_path": [[0, 1.0], [2, 0.25]]}))
    cohort.begin_step(3 * STEPS_PER_EPOCH)
    return float(list(drop_paths(cohort.residents[0].peer))[-1].drop_prob)  # type: ignore[arg-type]


def test_a_run_that_goes_on_late_has_the_rate_of_then() -> None:
    assert run_world(1, rate_of_a_late_start) == pytest.approx([0.05])


def test_torchvisions_stochastic_depth_is_found() -> None:
    from torchvision.models import convnext_tiny

    with torch.device("meta"):
        assert len(list(drop_paths(convnext_tiny(stochastic_depth_prob=0.1)))) == 3 + 3 + 9 + 3 - 1  # all but the first


def test_a_schedule_of_what_no_network_does_is_refused() -> None:
    config = config_of({"name": "independent"}, [PEERS[1]], train={"drop_path": [[0, 0.5]]})
    with pytest.raises(ConfigError, match=r"train.drop_path = \[\[0, 0.5\]\]: no network that learns drops paths; exp"):
        check_run(config, Launch(0, 0, 1))
    with pytest.raises(ConfigError, match=r"drop_path: expected \[epoch, factor\] pairs"):
        config_of(peers=PEERS, train={"drop_path": [[2, 0.5], [1, 0.5]]})

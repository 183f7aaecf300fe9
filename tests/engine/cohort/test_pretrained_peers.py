"""Peers that start from weights in a file, wherever they live."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

import models
from engine.config import ConfigError
from engine.preflight import check_run
from engine.ranks.collectives import Launch
from models.stages import plain_state
from tests.engine.stepping import cohort_of, config_of
from tests.runs import small_run
from tests.worlds import run_world


def _start(config: Any) -> dict[int, dict[str, torch.Tensor]]:
    cohort = cohort_of(config)
    return {k: {n: x.clone() for n, x in plain_state(r.whole).items()} for k, r in cohort.residents.items()}


@pytest.fixture
def weights(tmp_path: Path) -> tuple[Path, dict[str, torch.Tensor]]:
    state = models.create("cifar_resnet8_b", 10, 1, width=4).state_dict()
    save_file(state, tmp_path / "weights.safetensors")
    return tmp_path / "weights.safetensors", state


@pytest.mark.parametrize("ranks", [1, 2])
def test_the_peer_that_asks_for_it_starts_from_the_file(
    weights: tuple[Path, dict[str, torch.Tensor]], ranks: int
) -> None:
    path, state = weights
    network: dict[str, Any] = {"network": "cifar_resnet8_b", "options": {"width": 4}}
    peers = [{**network, "name": "taught", "pretrained": str(path)}, {**network, "name": "fresh"}]
    started = {k: peer for rank in run_world(ranks, _start, config_of(peers=peers)) for k, peer in rank.items()}
    assert all(torch.equal(started[0][name], state[name]) for name in state)
    assert not torch.equal(started[1]["conv1.weight"], state["conv1.weight"])


def test_a_file_that_is_not_there_is_refused_before_anything_starts(tiny: Path, tmp_path: Path) -> None:
    peers = [{"network": "cifar_resnet8_b", "copies": 2, "pretrained": str(tmp_path / "none.safetensors")}]
    config = small_run(tiny, tmp_path / "run", peers=peers)
    with pytest.raises(ConfigError, match=r"^peers.0: .*none.safetensors"):
        check_run(config, Launch(0, 0, 1))
    assert not (tmp_path / "run").exists()

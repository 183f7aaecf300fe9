"""Promises 3 and 5 for the methods whose peers share a trunk or modules: killed runs, and peers that leave."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

import models
from engine.config import RunConfig
from tests.kills import assert_same_state, final_state, kill_after_step, numbers
from tests.launch.command import run_command
from tests.marks import often
from tests.runs import small_run, train_here, weights
from tests.worlds import run_ranks

METHODS: dict[str, tuple[dict[str, Any], int]] = {
    "cl_ilr": ({"name": "cl_ilr"}, 2),
    "one": ({"name": "one"}, 2),
    "ffl": ({"name": "ffl"}, 2),
    "okddip": ({"name": "okddip"}, 3),
    "okddip_network": ({"name": "okddip", "form": "network"}, 3),
}


def _run(tiny: Path, folder: Path, method: str) -> RunConfig:
    options, peers = METHODS[method]
    return small_run(tiny, folder, options, peers, checkpoint={"every_steps": 3}, log={"every_steps": 1})


@pytest.mark.parametrize("method", often(METHODS, "ffl", "okddip_network"))
def test_a_killed_run_ends_with_the_same_bits_and_its_peers_leave_as_whole_networks(
    tiny: Path, tmp_path: Path, method: str
) -> None:
    ranks = METHODS[method][1]
    run_ranks(ranks, train_here, _run(tiny, tmp_path / "undisturbed", method))
    kill_after_step(ranks, _run(tiny, tmp_path / "killed", method), 4)
    run_ranks(ranks, train_here, _run(tiny, tmp_path / "killed", method))
    assert_same_state(final_state(tmp_path / "killed"), final_state(tmp_path / "undisturbed"))
    assert numbers(tmp_path / "killed") == numbers(tmp_path / "undisturbed")

    run_command("export", str(tmp_path / "killed"))
    state = weights(tmp_path / "killed")
    for path in (tmp_path / "killed" / "export").glob("*.json"):
        network = models.load_network(path)
        assert type(network) is type(models.create("cifar_resnet8_b", 10, 1, width=4))
        assert network.state_dict().keys() == {key.partition("/")[2] for key in state}
        for name, tensor in network.state_dict().items():
            assert torch.equal(tensor, state[f"{path.stem}/{name}"]), name

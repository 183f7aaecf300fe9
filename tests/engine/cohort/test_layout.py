"""In which order images and weights lie in memory."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from engine.cohort.cohort import Cohort
from engine.cohort.layout import layout_of
from engine.ranks.planning.choosing import plan
from engine.training.showing import shown
from models.stages import plain_state
from tests.engine.stepping import CLASSES, CPU, batches, cohort_of, config_of, do_steps
from tests.runs import assert_same_weights
from tests.worlds import run_world

LAST, FIRST = torch.channels_last, torch.contiguous_format

# cifar_resnet8_b, 4 channels wide, on gray images of 4 x 4: what goes in and comes out of the first convolution, of two
# in the first block, and of two and the shortcut's in the others, where maps are of 2 x 2 and of one pixel.
MAPS = (16 + 64) + 4 * 64 + (64 + 32) + (32 + 32) + (64 + 32) + (32 + 16) + (16 + 16) + (32 + 16)
WEIGHTS = 9 * (4 + 2 * 16 + 32 + 64 + 128 + 256) + 32 + 128


def auto(rows: int, ranks: int = 1, device: str = "cpu", parts: int = 1, **placement: Any) -> torch.memory_format:
    """Of two peers on 4 x 4 images."""
    config = config_of(data={"global_batch": rows}, train={"accumulation": parts}, placement=placement)
    return layout_of(config, plan(config, ranks, 0), torch.device(device), 1, 4)


def test_auto_weighs_maps_against_weights() -> None:
    """From 1.5 numbers of maps a weight, which is 1.5 x 4804 / 720 = 10.01 rows, so 11."""
    assert (WEIGHTS, MAPS) == (4804, 720)
    assert auto(10) == FIRST
    assert auto(11) == LAST
    assert auto(10, device="meta") == LAST  # whatever device the forecast is for


def test_auto_says_nothing_of_a_network_that_takes_no_such_images() -> None:
    config = config_of(peers=[{"network": "torchvision/densenet121"}], method={"name": "independent"})
    assert layout_of(config, plan(config, 1, 0), CPU, 3, 4) == LAST


def test_auto_counts_the_rows_of_one_pass_of_one_rank() -> None:
    assert auto(20, 2, kind="colocated") == FIRST
    assert auto(22, 2, kind="colocated") == LAST
    assert auto(12, 2, kind="spread") == LAST  # each rank has one peer, and all rows
    assert auto(20, parts=2) == FIRST


@pytest.mark.parametrize("ranks", [1, 2])
def test_images_lie_as_weights_do(ranks: int) -> None:
    """In training and in evaluation; whichever it is, the numbers are the same."""
    found = [run_world(ranks, trained, channels_last) for channels_last in (True, False)]
    for channels_last, each in zip((True, False), found, strict=True):
        for layouts, _ in each:
            assert layouts == {(channels_last, channels_last)}
    for (_, one), (_, other) in zip(*found, strict=True):
        assert_same_weights(one, other, 1e-4)


def trained(channels_last: bool) -> tuple[set[tuple[bool, bool]], dict[str, torch.Tensor]]:
    """Whether images and weights lie channels last, as networks see them; the weights after three steps."""
    cohort = cohort_of(config_of(precision={"channels_last": channels_last}), channels=3)
    layouts: set[tuple[bool, bool]] = set()

    def look(network: nn.Module, inputs: tuple[torch.Tensor]) -> None:
        weights = [p for p in network.parameters() if p.ndim == 4 and p.shape[1] > 1 and p.shape[2] > 1]
        layouts.add((is_last(inputs[0]), all(map(is_last, weights))))
        assert is_last(inputs[0]) or not any(map(is_last, weights))

    for resident in cohort.residents.values():
        resident.peer.network.register_forward_pre_hook(look)
    do_steps(cohort, range(3), channels=3)
    evaluated(cohort)
    return layouts, {f"{k}/{name}": x for k, r in cohort.residents.items() for name, x in plain_state(r.whole).items()}


def evaluated(cohort: Cohort) -> None:
    [rows] = [piece for _, pieces in batches(cohort, [0], 3) for piece in pieces]
    networks = {k: resident.whole for k, resident in cohort.residents.items()}
    split = [rows], len(rows.ids), CLASSES
    for _ in shown(networks, cohort.exchange, cohort.placement, *split, CPU, None):
        pass


def is_last(x: torch.Tensor) -> bool:
    return x.is_contiguous(memory_format=LAST) and not x.is_contiguous()

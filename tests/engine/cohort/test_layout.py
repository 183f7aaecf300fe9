"""In which order images, maps and weights lie in memory."""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

import pytest
import torch
from torch import nn

from engine.cohort.layout import channels_first, maps_a_weight
from engine.config import RunConfig
from models.stages import plain_state
from tests.engine.stepping import CPU, cohort_in_double, cohort_of, config_of, do_steps
from tests.marks import slow
from tests.runs import assert_same_weights
from tests.worlds import run_world

# cifar_resnet8_b, 4 channels wide, gray images of 4 x 4: numbers that go in and come out, over weights.
RATIOS = {
    "conv1": (16 + 64) / (9 * 4),
    "layer1.0.conv1": (64 + 64) / (9 * 16),
    "layer1.0.conv2": (64 + 64) / (9 * 16),
    "layer2.0.conv1": (64 + 32) / (9 * 32),
    "layer2.0.conv2": (32 + 32) / (9 * 64),
    "layer2.0.shortcut.0": (64 + 32) / 32,
    "layer3.0.conv1": (32 + 16) / (9 * 128),
    "layer3.0.conv2": (16 + 16) / (9 * 256),
    "layer3.0.shortcut.0": (32 + 16) / 128,
}


def test_maps_and_weights_of_each_convolution_are_counted() -> None:
    found = maps_a_weight("cifar_resnet8_b", '{"width": 4}', 1, 4)
    assert found == pytest.approx(RATIOS)


def first(rows: float, device: str = "cpu", channels_last: str = "auto") -> Collection[str]:
    """On 4 x 4 images."""
    config = config_of(precision={"channels_last": channels_last})
    return set(channels_first(config, config.peers[0], torch.device(device), rows, 1, 4))


def test_auto_has_those_lie_first_that_have_more_than_two_weights_a_map() -> None:
    """8 rows: 8 x 64 / 576 = 0.89 of layer2.0.conv2, 8 x 48 / 1152 = 0.33 of layer3.0.conv1, 0.11 of the last."""
    assert first(8) == {"layer3.0.conv1", "layer3.0.conv2"}
    assert first(12) == {"layer3.0.conv2"}  # 0.5 exactly of the other
    assert first(36) == set()  # 0.5
    assert first(2) == {"layer2.0.conv2", "layer3.0.conv1", "layer3.0.conv2"}
    for elsewhere in ("cuda", "meta"):
        assert first(2, device=elsewhere) == set()
    for said in ("on", "off"):
        assert first(2, channels_last=said) == set()


def lie_first(config: RunConfig) -> set[str]:
    """Of convolutions with a kernel and several channels, those of this rank's first peer that do not lie last."""
    network = next(iter(cohort_of(config).residents.values())).whole
    several = {name: p for name, p in network.named_parameters() if p.ndim == 4 and p.shape[1] > 1 and p.shape[2] > 1}
    return {name for name, p in several.items() if not is_last(p)}


@pytest.mark.parametrize(
    ("ranks", "sections", "rows"),
    [
        (1, {}, 4),
        (1, {"train": {"accumulation": 2}}, 2),
        (2, {"placement": {"kind": "colocated"}}, 2),
        (2, {"placement": {"kind": "spread"}}, 4),
    ],
)
def test_rows_are_those_of_a_pass_of_a_rank(ranks: int, sections: dict[str, Any], rows: int) -> None:
    """16 x 16 images have 16 times the maps: 0.22 a row in the last convolution, more than 0.5 from three rows on."""
    expected: set[str] = {"layer3.0.conv2.weight"} if rows == 2 else set()
    assert run_world(ranks, lie_first, config_of(data={"global_batch": 4}, **sections)) == [expected] * ranks


def test_auto_says_nothing_of_a_network_that_takes_no_such_images() -> None:
    config = config_of(peers=[{"network": "torchvision/densenet121"}], method={"name": "independent"})
    assert not channels_first(config, config.peers[0], CPU, 1, 3, 4)


WIDE = [{"network": "cifar_resnet8_b", "copies": 2, "options": {"width": 12}}]
"""Of four rows of 16 x 16, 4 x 2 x 48 x 16 numbers of maps in its last convolution, for 20,736 weights: 0.30."""


# Fused updates have float32 alone, in which a unit of some methods turns over within three steps.
@pytest.mark.parametrize(
    ("method", "double", "within", "sections"),
    [
        ("dml", False, 1e-4, {}),
        ("dml", False, 1e-4, {"placement": {"kind": "colocated"}}),
        ("dml", True, 1e-10, {"train": {"batch_peers": "on"}, "placement": {"kind": "colocated"}}),
        ("one", True, 1e-10, {}),
        ("lmcl", True, 1e-10, {}),
    ],
)
@pytest.mark.parametrize("ranks", [slow(1), 2])
def test_it_changes_no_number(method: str, double: bool, within: float, sections: Any, ranks: int) -> None:
    """Of weights after steps, and each convolution gets maps that lie as its weights do."""
    section: dict[str, Any] = {"name": method, "meta_interval": 2} if method == "lmcl" else {"name": method}
    found = {}
    for channels_last in ("on", "off", "auto"):
        layout = {"precision": {"channels_last": channels_last}, "data": {"global_batch": 4}}
        config = config_of(section, WIDE, **layout, **sections)
        found[channels_last] = run_world(ranks, trained, config, double)
        seen = {"on": {True}, "off": {False}, "auto": {True, False}}[channels_last]
        for _, last in found[channels_last]:
            assert last == (set() if "train" in sections else seen)  # peers as one have no weights of their own
    for channels_last in ("off", "auto"):
        for (one, _), (other, _) in zip(found[channels_last], found["on"], strict=True):
            assert_same_weights(one, other, within)


def trained(config: RunConfig, double: bool) -> tuple[dict[str, torch.Tensor], set[bool]]:
    """The weights after three steps; whether maps lie channels last, as convolutions of networks see them."""
    cohort = cohort_in_double(config) if double else cohort_of(config)
    seen: set[bool] = set()

    def look(convolution: nn.Conv2d, inputs: tuple[torch.Tensor], _: torch.Tensor) -> None:
        stands_in = not isinstance(convolution.weight, nn.Parameter)  # as on the way of an outer step
        if not stands_in and all(
            tensor.shape[1] > 1 and tensor.shape[2] > 1 for tensor in (convolution.weight, inputs[0])
        ):
            assert is_last(inputs[0]) == is_last(convolution.weight)
            seen.add(is_last(inputs[0]))

    for resident in cohort.residents.values():
        for part in resident.whole.modules():
            if isinstance(part, nn.Conv2d):
                part.register_forward_hook(look)
    do_steps(cohort, range(3))
    return {f"{k}/{name}": x for k, r in cohort.residents.items() for name, x in plain_state(r.whole).items()}, seen


def is_last(x: torch.Tensor) -> bool:
    return x.is_contiguous(memory_format=torch.channels_last) and not x.is_contiguous()

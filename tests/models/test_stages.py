"""Stage taps and cuts: one mechanism for networks of ours, of timm and of torchvision."""

from __future__ import annotations

import copy

import pytest
import torch

import models
from models.stages import Stage, Taps, cut, stages

LIBRARY = {
    "timm/resnet18": [("layer1", 64, 56), ("layer2", 128, 28), ("layer3", 256, 14), ("layer4", 512, 7)],
    "torchvision/resnet50": [("layer1", 256, 56), ("layer2", 512, 28), ("layer3", 1024, 14), ("layer4", 2048, 7)],
    "torchvision/shufflenet_v2_x1_0": [
        ("maxpool", 24, 56),
        ("stage2", 116, 28),
        ("stage3", 232, 14),
        ("conv5", 1024, 7),
    ],
    "torchvision/mobilenet_v2": [
        ("features.3", 24, 56),
        ("features.6", 32, 28),
        ("features.13", 96, 14),
        ("features", 1280, 7),
    ],
    "timm/mobilenetv1_100": [("blocks.1", 128, 56), ("blocks.2", 256, 28), ("blocks.3", 512, 14), ("bn2", 1024, 7)],
    "torchvision/densenet121": [
        ("features.denseblock1", 256, 56),
        ("features.denseblock2", 512, 28),
        ("features.denseblock3", 1024, 14),
        ("features", 1024, 7),
    ],
    "timm/convnext_atto": [("stages.0", 40, 56), ("stages.1", 80, 28), ("stages.2", 160, 14), ("norm_pre", 320, 7)],
}
OURS = {
    "cifar_resnet20_a": [(16, 32), (32, 16), (64, 8)],
    "cifar_resnet32_b": [(16, 32), (32, 16), (64, 8)],
    "cifar_wrn_16_2": [(32, 32), (64, 16), (128, 8)],
}
EVERY = [*((name, 3, 224) for name in LIBRARY), *((name, channels, 32) for name in OURS for channels in (1, 3))]


def _network(name: str, channels: int) -> torch.nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return models.create(name, 10, channels).eval()


@pytest.mark.parametrize("name", LIBRARY)
def test_stages_of_library_networks_are_the_usual_ones(name: str) -> None:
    assert stages(_network(name, 3), 3, 224) == [Stage(*stage) for stage in LIBRARY[name]]


@pytest.mark.parametrize("name", OURS)
def test_stages_of_cifar_networks_are_those_of_the_papers(name: str) -> None:
    assert [(s.channels, s.side) for s in stages(_network(name, 3), 3, 32)] == OURS[name]


def test_network_without_stages_is_refused() -> None:
    with pytest.raises(ValueError, match=r"^VisionTransformer has no stages: no feature maps that shrink"):
        stages(_network("timm/vit_tiny_patch16_224", 3), 3, 224)


@pytest.mark.parametrize(("name", "channels", "side"), EVERY)
def test_taps_show_every_stage_and_leave_the_logits_alone(name: str, channels: int, side: int) -> None:
    network, images = _network(name, channels), torch.randn(2, channels, side, side)
    found = stages(network, channels, side)
    with torch.inference_mode():
        expected = network(images)
        taps = Taps(network, {f"stage{j}": s.module for j, s in enumerate(found, 1)}, {})
        logits, maps = network(images), taps.take()
    assert torch.equal(logits, expected)
    assert {name: tuple(x.shape) for name, x in maps.items()} == {
        f"stage{j}": (2, s.channels, s.side, s.side) for j, s in enumerate(found, 1)
    }


@pytest.mark.parametrize(("name", "channels", "side"), EVERY)
def test_trunk_and_branch_give_the_logits_of_the_whole(name: str, channels: int, side: int) -> None:
    whole, images = _network(name, channels), torch.randn(2, channels, side, side)
    with torch.inference_mode():
        expected = whole(images)
        for stage in stages(whole, channels, side)[:-1]:
            trunk, branch = cut(copy.deepcopy(whole), stage.module)
            assert torch.equal(branch(trunk(images)), expected), stage.module
            both = {**trunk.state_dict(), **branch.state_dict()}
            assert len(both) == len(trunk.state_dict()) + len(branch.state_dict())
            assert both.keys() == whole.state_dict().keys()


def test_gradients_pass_through_taps_and_cuts() -> None:
    network, images = _network("cifar_resnet20_a", 3).train(), torch.randn(4, 3, 32, 32)
    taps = Taps(network, {"map": "layer2"}, {})
    (network(images).sum() + taps.take()["map"].square().sum()).backward()
    first = next(network.parameters()).grad
    assert first is not None
    assert first.abs().sum() > 0


def test_input_of_the_classifier_can_be_tapped() -> None:
    network = _network("torchvision/resnet18", 3)
    classifier, width = models.pooled_features(network)
    with torch.inference_mode():
        taps = Taps(network, {}, {"features": classifier})
        logits, maps = network(torch.randn(2, 3, 64, 64)), taps.take()
        assert taps.take() == {}
        assert maps["features"].shape == (2, width)
        assert torch.equal(network.get_submodule(classifier)(maps["features"]), logits)


@pytest.mark.parametrize("after", ["layer9", "layer1.7", "features.3"])
def test_cut_at_a_place_that_is_not_there_names_those_that_are(after: str) -> None:
    network = _network("torchvision/resnet18", 3)
    with pytest.raises(
        ValueError, match=r"has no submodule .* to cut after; it has conv1, bn1, relu, maxpool, layer1"
    ) as e:
        cut(network, after)
    assert repr(after) in str(e.value)


@pytest.mark.slow
@pytest.mark.parametrize(("name", "side"), [("cifar_resnet20_a", 32), ("cifar_wrn_16_2", 32), ("timm/resnet18", 64)])
def test_taps_survive_compilation(name: str, side: int) -> None:
    torch._dynamo.reset()
    network, images = _network(name, 3), torch.randn(2, 3, side, side)
    outputs = {f"stage{j}": stage.module for j, stage in enumerate(stages(network, 3, side), 1)}
    classifier, _ = models.pooled_features(network)
    eager = copy.deepcopy(network)
    taps = Taps(network, outputs, {"features": classifier})
    network.compile()
    for _ in range(2):
        logits, maps = network(images), taps.take()
        reference = copy.deepcopy(eager)
        reference_taps = Taps(reference, outputs, {"features": classifier})
        torch.testing.assert_close(logits, reference(images), rtol=1e-4, atol=1e-4)
        expected = reference_taps.take()
        assert maps.keys() == expected.keys()
        for key, value in expected.items():
            torch.testing.assert_close(maps[key], value, rtol=1e-4, atol=1e-4)
            assert maps[key].requires_grad

"""The pooled feature that a hook on the classifier's input sees."""

from __future__ import annotations

import re

import pytest
import torch
from torch import Tensor, nn

from models import create, parameter_count, pooled_features


@pytest.mark.parametrize(
    ("network_name", "size", "expected"),
    [
        ("cifar_resnet8_a", 32, ("fc", 64)),
        ("cifar_wrn_10_2", 28, ("fc", 128)),
        ("cifar_vgg16", 32, ("classifier", 512)),
        ("cifar_stem_efficientnet_b3", 32, ("classifier", 1536)),
        ("timm/resnet18", 64, ("fc", 512)),
        ("timm/mobilenetv2_100", 64, ("classifier", 1280)),
        ("timm/vit_tiny_patch16_224", 224, ("head", 192)),
        ("timm/convnext_atto", 64, ("head.fc", 320)),
        ("timm/levit_256d", 224, ("head.linear", 512)),
        ("torchvision/resnet18", 64, ("fc", 512)),
        ("torchvision/googlenet", 64, ("fc", 1024)),
        ("torchvision/mobilenet_v3_small", 64, ("classifier.3", 1024)),
        ("torchvision/vit_b_32", 224, ("heads.head", 768)),
    ],
)
def test_the_classifier_of_the_pooled_feature_is_the_logits(
    network_name: str, size: int, expected: tuple[str, int]
) -> None:
    network = create(network_name, 10).eval()
    name, width = pooled_features(network)
    assert (name, width) == expected
    classifier = network.get_submodule(name)
    seen: list[Tensor] = []
    classifier.register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0]))
    with torch.no_grad():
        logits = network(torch.randn(2, 3, size, size))
        assert seen[0].shape == (2, width)
        assert torch.equal(classifier(seen[0]), logits)


def test_the_last_of_several_linears_with_as_many_outputs_counts() -> None:
    network = nn.Sequential(nn.Linear(4, 10), nn.Linear(10, 10))
    assert pooled_features(network) == ("1", 10)


@pytest.mark.parametrize(
    ("name", "classifier"),
    [
        ("torchvision/squeezenet1_1", ""),
        ("timm/resnetv2_50", " is Conv2d and"),
        ("timm/deit_tiny_distilled_patch16_224", " is (Linear, Linear) and"),
    ],
)
def test_networks_without_one_linear_classifier_are_refused(name: str, classifier: str) -> None:
    with torch.device("meta"):
        network = create(name, 10)
    message = (
        f"{type(network).__name__}: no pooled feature to take, for its classifier{classifier} has 0 nn.Linear with "
        "10 outputs; expected 1"
    )
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        pooled_features(network)


def test_two_heads_inside_one_classifier_are_refused() -> None:
    with torch.device("meta"):
        network = create("timm/crossvit_9_240", 10)
    with pytest.raises(
        ValueError, match=r"its classifier is ModuleList and has 2 nn.Linear with 10 outputs; expected 1$"
    ):
        pooled_features(network)


def test_parameter_count_leaves_buffers_out() -> None:
    assert parameter_count(nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4))) == 3 * 4 + 4 + 2 * 4

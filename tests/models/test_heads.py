"""Auxiliary classifiers and projections: the published sizes, to the last parameter, and what they give."""

from __future__ import annotations

import pytest
import torch

import models
from models.heads import DESIGNS, Auxiliary, Projection, auxiliary
from models.stages import stages
from tests.marks import slow

# L-MCL's table of "aux params (per net)", 100 classes on CIFAR and 1000 on ImageNet.
LMCL = {
    ("cifar_resnet32_b", 32, 100): 809_096,
    ("cifar_resnet56_b", 32, 100): 1_475_208,
    ("cifar_resnet110_bottleneck", 32, 100): 2_011_080,
    ("cifar_wrn_16_2", 32, 100): 1_208_200,
    ("cifar_wrn_40_2", 32, 100): 3_867_528,
    ("cifar_wrn_28_4", 32, 100): 10_089_032,
    ("cifar_shufflenetv2_x0_5", 32, 100): 827_768,
    ("cifar_shufflenetv2_x1_0", 32, 100): 2_406_252,
    ("cifar_hcgnet_a1", 32, 100): 1_478_429,
    ("cifar_hcgnet_a2", 32, 100): 4_114_546,
    ("torchvision/resnet18", 224, 1000): 14_626_488,
    ("torchvision/resnet34", 224, 1000): 14_626_488,
    ("torchvision/resnet50", 224, 1000): 27_669_944,
    ("torchvision/shufflenet_v2_x0_5", 224, 1000): 3_964_128,
    ("torchvision/shufflenet_v2_x1_0", 224, 1000): 6_119_796,
}
DCM = {
    ("cifar_wrn_28_10", 1): 20_145_060,
    ("cifar_wrn_28_10", 2): 107_464_420,
    ("cifar_mobilenet", 1): 2_637_668,
    ("cifar_mobilenet", 2): 5_484_132,
}


@pytest.mark.parametrize(("name", "side", "classes"), LMCL)
def test_sizes_of_lmcls_extractors(name: str, side: int, classes: int) -> None:
    with torch.device("meta"):
        count = len(stages(models.create(name, classes), 3, side))
    built = [auxiliary(name, {}, classes, 3, side, j, "lmcl") for j in range(1, count)]
    assert sum(models.parameter_count(head) for head in built) == LMCL[name, side, classes]


@pytest.mark.parametrize(("name", "stage"), DCM)
def test_sizes_of_dcms_classifiers(name: str, stage: int) -> None:
    assert models.parameter_count(auxiliary(name, {}, 100, 3, 32, stage, "dcm")) == DCM[name, stage]


@pytest.mark.parametrize("design", DESIGNS)
@pytest.mark.parametrize(
    ("name", "channels", "side"),
    [
        ("cifar_wrn_16_2", 1, 28),
        ("cifar_resnet20_a", 3, 32),
        slow("cifar_mobilenet", 3, 32),
        slow("cifar_vgg16", 3, 32),
        ("timm/resnet18", 3, 64),
        ("torchvision/mobilenet_v2", 3, 96),
        slow("torchvision/densenet121", 3, 64),
    ],
)
def test_every_head_takes_its_stages_map_to_logits_and_features(
    name: str, channels: int, side: int, design: str
) -> None:
    found = stages(models.create(name, 10, channels), channels, side)
    for j, stage in enumerate(found[:-1], 1):
        head = auxiliary(name, {}, 10, channels, side, j, design)
        maps = torch.randn(2, stage.channels, stage.side, stage.side, requires_grad=True)
        shown = head(maps)
        assert shown.keys() == {"logits", "features"}
        assert shown["logits"].shape == (2, 10)
        assert shown["features"].shape == (2, head.num_features)
        shown["logits"].sum().backward()
        assert maps.grad is not None
        assert maps.grad.abs().sum() > 0


def test_heads_have_weights_of_their_own() -> None:
    one, other = (auxiliary("cifar_resnet20_a", {}, 10, 3, 32, 1) for _ in range(2))
    assert isinstance(one, Auxiliary)
    assert not torch.equal(next(one.parameters()), next(other.parameters()))


def test_rule_repeats_the_remaining_stages_of_the_network() -> None:
    """After stage 1 of ResNet-20: stages 2 and 3 and the classifier, under their own names."""
    whole = models.create("cifar_resnet20_a", 10).state_dict()
    head = auxiliary("cifar_resnet20_a", {}, 10, 3, 32, 1).network.state_dict()
    assert head.keys() == {name for name in whole if name.startswith(("layer2", "layer3", "fc"))}
    assert all(head[name].shape == whole[name].shape for name in head)


def test_projection_is_two_layers_and_rows_of_unit_length() -> None:
    """148,992 parameters for L-MCL's ResNet-32 pair: 6 heads of Linear(64, 128) and Linear(128, 128), biases too."""
    projection = Projection(64, 128)
    assert 6 * models.parameter_count(projection) == 148_992
    assert torch.allclose(projection(torch.randn(5, 64)).norm(dim=1), torch.ones(5), atol=1e-6)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("cifar_resnet20_a", {}, 10, 3, 32, 1, "dcn"), "design 'dcn'; expected one of rule, dcm, lmcl"),
        (
            ("cifar_resnet20_a", {}, 10, 3, 32, 3),
            "network 'cifar_resnet20_a': no stage 3 to go on after; expected 1 .. 2",
        ),
        (
            ("cifar_wrn_10_2", {}, 10, 3, 32, 1, "dcm"),
            "DCM's classifier after stage 1 halves the 1 block of stage 3; expected depth >= 16",
        ),
    ],
)
def test_what_cannot_be_built_is_refused(arguments: tuple, message: str) -> None:
    with pytest.raises(ValueError, match=r"expected") as error:
        auxiliary(*arguments)
    assert str(error.value) == message

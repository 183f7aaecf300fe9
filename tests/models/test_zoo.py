"""Every network of the specs: its size to the last digit, its shapes, its start, and that it trains."""

from __future__ import annotations

import math
from collections.abc import Iterable
from functools import cache
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.flop_counter import FlopCounterMode

from models import check, create, parameter_count
from models.layers import Straight
from models.registry import families
from models.shapes_alone import dry_run

STEMS = [
    f"cifar_stem_{network}"
    for network in ("resnet18", "inception_v1", "densenet121", "resnext50", "efficientnet_b3", "mobilenet_v2")
]
OURS = [
    "cifar_resnet20_a",
    "cifar_resnet20_b",
    "cifar_resnet11_bottleneck",
    "cifar_wrn_16_2",
    "cifar_wrn_16_4_dcl",
    "cifar_wrn_11_8_bottleneck",
    "cifar_vgg16",
    "cifar_densenet_bc_40_12",
    "cifar_densenet_bc_40_12_pcl",
    "cifar_densenet_40_12",
    "cifar_shufflenetv2_x0_5",
    "cifar_shufflenetv2_x1_0",
    "cifar_hcgnet_a1",
    "cifar_hcgnet_a2",
    "cifar_mobilenet",
]
# For real arithmetic: one of each family of our own, as small as it comes.
SMALL = [
    "cifar_resnet8_a",
    "cifar_resnet11_bottleneck",
    "cifar_wrn_10_1",
    "cifar_wrn_10_1_dcl",
    "cifar_wrn_11_2_bottleneck",
    "cifar_vgg16",
    "cifar_densenet_bc_10_12",
    "cifar_densenet_bc_10_12_pcl",
    "cifar_densenet_7_12",
    "cifar_shufflenetv2_x0_5",
    "cifar_hcgnet_a1",
    "cifar_mobilenet",
]


@cache
def multiply_adds(name: str, num_classes: int, side: int) -> int:
    with torch.device("meta"):
        network = create(name, num_classes).eval()
        with FlopCounterMode(display=False) as counter:
            network(torch.empty(1, 3, side, side))
    return counter.get_total_flops() // 2


def size_of(modules: Iterable[nn.Module]) -> int:
    return sum(parameter_count(module) for module in modules)


def test_every_family_of_ours_is_here() -> None:
    here = {*OURS, *STEMS}
    for family in families():
        assert any(family.pattern.fullmatch(name) for name in here), family.pattern.pattern


@pytest.mark.parametrize(
    ("name", "parameters", "mega_macs"),
    [
        ("cifar_resnet110_bottleneck", 1_170_868, 167.45),  # mcl.md 3.1, pcl_family.md 0.2
        ("cifar_resnet164_bottleneck", 1_727_284, None),  # pcl_family.md 0.2: ONE
        ("cifar_wrn_16_4_dcl", 2_774_276, 393),  # dml_dcm_dcl.md C2
        ("cifar_wrn_20_8_bottleneck", 1_629_776 + 5_241_444, None),  # pcl_family.md 1.2, and so the next four
        ("cifar_vgg16", 7_640_640 + 7_659_108, None),
        ("cifar_densenet_bc_40_12_pcl", 115_848 + 71_980, None),
        ("cifar_densenet_bc_40_12", 188_092, None),  # 4.2
        ("cifar_shufflenetv2_x0_5", 444_292, 10.99),  # mcl.md 3.1
        ("cifar_shufflenetv2_x1_0", 1_356_104, 45.09),
        ("cifar_mobilenet", 3_309_476, 612),  # dml_dcm_dcl.md B2
        ("cifar_stem_resnet18", 11_220_132, 555),  # dml_dcm_dcl.md C2
        ("cifar_stem_inception_v1", 5_694_724, 1450),
        ("cifar_stem_densenet121", 7_048_676, 888),
        ("cifar_stem_resnext50", 23_177_124, 1344),
        ("cifar_stem_efficientnet_b3", 10_849_932, 80),
        ("cifar_stem_mobilenet_v2", 2_351_972, 25),
    ],
)
def test_parameters_and_multiply_adds_are_the_specs(name: str, parameters: int, mega_macs: float | None) -> None:
    with torch.device("meta"):
        assert parameter_count(create(name, 100)) == parameters
    if mega_macs is not None:
        # The spec rounds: to the digits that are here, and C2's Inception to three.
        digits = -1 if mega_macs == 1450 else len(str(mega_macs).partition(".")[2])
        assert round(multiply_adds(name, 100, 32) / 1e6, digits) == mega_macs


def test_the_plain_densenet_has_the_size_that_is_known_for_ten_classes() -> None:
    with torch.device("meta"):
        assert parameter_count(create("cifar_densenet_40_12", 10)) == 1_019_722


@pytest.mark.parametrize(
    ("name", "parameters", "mega_macs"),
    [
        ("torchvision/resnet18", 11_689_512, 1814),  # mcl.md 3.1
        ("torchvision/resnet34", 21_797_672, 3664),
        ("torchvision/resnet50", 25_557_032, 4089),
        ("torchvision/shufflenet_v2_x0_5", 1_366_792, 40.48),
        ("torchvision/shufflenet_v2_x1_0", 2_278_604, 144.91),
        ("timm/resnet18", 11_689_512, 1814),
        ("timm/resnet34", 21_797_672, 3664),
        ("timm/resnet50", 25_557_032, 4089),
        # The next are the libraries' own numbers, for the specs have none.
        ("torchvision/resnext50_32x4d", 25_028_904, None),
        ("timm/resnext50_32x4d", 25_028_904, None),
        ("torchvision/mobilenet_v2", 3_504_872, 300.77),
        ("timm/mobilenetv2_100", 3_504_872, 300.77),
        ("timm/mobilenetv1_100", 4_231_976, 568.74),
    ],
)
def test_imagenet_networks_have_the_specs_size(name: str, parameters: int, mega_macs: float | None) -> None:
    check(name)
    with torch.device("meta"):
        assert parameter_count(create(name, 1000)) == parameters
    if mega_macs is not None:
        assert round(multiply_adds(name, 1000, 224) / 1e6, len(str(mega_macs).partition(".")[2])) == mega_macs


@pytest.mark.parametrize(
    ("name", "trunk_end", "trunk", "branch"),
    [  # pcl_family.md 1.2
        ("cifar_resnet32_b", "layer2", 112_592, 360_164),
        ("cifar_resnet110_bottleneck", "layer2", 275_280, 895_588),
        ("cifar_wrn_20_8_bottleneck", "layer2", 1_629_776, 5_241_444),
        ("cifar_vgg16", "block4", 7_640_640, 7_659_108),
        ("cifar_densenet_bc_40_12_pcl", "trans2", 115_848, 71_980),
        ("cifar_densenet_bc_40_12", "trans2", 115_848, 71_980 + 264),
    ],
)
def test_trunk_and_branch_have_the_specs_size(name: str, trunk_end: str, trunk: int, branch: int) -> None:
    with torch.device("meta"):
        children = dict(create(name, 100).named_children())
    cut = list(children).index(trunk_end) + 1
    assert size_of(list(children.values())[:cut]) == trunk
    assert size_of(list(children.values())[cut:]) == branch


@pytest.mark.parametrize(
    ("name", "sizes", "total"),
    [  # mcl.md 3.5
        ("cifar_hcgnet_a1", (648, 46_440, 70_638, 185_208, 306_213, 451_176, 828, 41_500), 1_102_651),
        ("cifar_hcgnet_a2", (1_296, 175_800, 278_073, 444_168, 798_306, 1_362_904, 1_432, 71_700), 3_133_679),
    ],
)
def test_each_part_of_hcgnet_has_the_specs_size(name: str, sizes: tuple[int, ...], total: int) -> None:
    with torch.device("meta"):
        network = create(name, 100)
    parts = ("conv1", "block1", "trans1", "block2", "trans2", "block3", "bn", "fc")
    assert tuple(parameter_count(network.get_submodule(part)) for part in parts) == sizes
    assert parameter_count(network) == total


@pytest.mark.parametrize(("name", "spec"), [("cifar_hcgnet_a1", 154.67), ("cifar_hcgnet_a2", 489.38)])
def test_hcgnets_multiply_adds_are_the_specs_but_for_what_its_counter_does_not_know(name: str, spec: float) -> None:
    network = create(name, 100)
    sides = {"block1": 32, "trans1": 16, "block2": 16, "trans2": 8, "block3": 8}
    too_many = 0
    for part, side in sides.items():
        for module in network.get_submodule(part).modules():
            if isinstance(module, nn.Conv2d) and module.dilation != (1, 1):
                # Padded by 2 on each side and taken for a plain 3x3, its map is 2 wider and 2 higher.
                too_many += module.weight.numel() * ((side + 2) ** 2 - side**2)
    assert too_many == {"cifar_hcgnet_a1": 402_408, "cifar_hcgnet_a2": 709_776}[name]
    assert round((multiply_adds(name, 100, 32) + too_many) / 1e6, 2) == spec


@pytest.mark.parametrize(
    ("name", "maps", "pooled"),
    [  # (channels, side) of mcl.md 3.1, pcl_family.md 1.2, dml_dcm_dcl.md B2
        ("cifar_resnet32_b", [(16, 32), (32, 16), (64, 8)], 64),
        ("cifar_resnet110_bottleneck", [(64, 32), (128, 16), (256, 8)], 256),
        ("cifar_wrn_28_4", [(64, 32), (128, 16), (256, 8)], 256),
        ("cifar_wrn_16_4_dcl", [(64, 32), (128, 16), (256, 8)], 256),
        ("cifar_wrn_20_8_bottleneck", [(64, 32), (128, 16), (256, 8)], 256),
        ("cifar_vgg16", [(64, 16), (128, 8), (256, 4), (512, 2), (512, 1)], 512),
        ("cifar_densenet_bc_40_12", [(48, 16), (60, 8), (132, 8)], 132),
        ("cifar_densenet_40_12", [(160, 16), (304, 8), (448, 8)], 448),
        ("cifar_shufflenetv2_x0_5", [(48, 16), (96, 8), (192, 4)], 1024),
        ("cifar_shufflenetv2_x1_0", [(116, 16), (232, 8), (464, 4)], 1024),
        ("cifar_hcgnet_a1", [(60, 16), (126, 8), (414, 8)], 414),
        ("cifar_hcgnet_a2", [(120, 16), (204, 8), (716, 8)], 716),
        ("cifar_mobilenet", [(256, 32), (512, 16), (1024, 8)], 1024),
        ("cifar_stem_resnet18", [(64, 32), (128, 16), (256, 8), (512, 4)], 512),
        ("cifar_stem_resnext50", [(256, 32), (512, 16), (1024, 8), (2048, 4)], 2048),
        ("cifar_stem_inception_v1", [(480, 32), (832, 16), (1024, 8)], 1024),
        ("cifar_stem_densenet121", [(128, 16), (256, 8), (512, 4), (1024, 4)], 1024),
        ("cifar_stem_efficientnet_b3", [(24, 32), (32, 16), (48, 8), (136, 4), (384, 2)], 1536),
        ("cifar_stem_mobilenet_v2", [(16, 32), (24, 16), (32, 8), (96, 4), (320, 2)], 1280),
    ],
)
def test_stages_give_the_specs_maps(name: str, maps: list[tuple[int, int]], pooled: int) -> None:
    seen: list[Any] = []
    with torch.device("meta"):
        network = create(name, 100)
        names = vars(network).get("stages") or type(network).stages
        assert isinstance(names, tuple)
        for path in names:
            network.get_submodule(path).register_forward_hook(lambda _, __, output: seen.append(tuple(output.shape)))
        linears = [module for module in network.modules() if isinstance(module, nn.Linear)]
        network(torch.empty(2, 3, 32, 32))
    assert seen == [(2, channels, side, side) for channels, side in maps]
    assert linears[0 if name == "cifar_vgg16" else -1].in_features == pooled


@pytest.mark.parametrize("name", OURS)
def test_networks_of_ours_are_their_children_in_a_row(name: str) -> None:
    with torch.device("meta"):
        network = create(name, 10)
    assert isinstance(network, Straight)
    assert type(network).forward is Straight.forward
    assert not [m for m in network.modules() if getattr(m, "inplace", False)]  # it would change what a tap shows


@pytest.mark.parametrize("name", [*OURS, *STEMS])
def test_logits_for_every_number_of_channels_and_classes(name: str) -> None:
    for in_channels, num_classes, side in ((1, 10, 32), (3, 100, 64), (3, 1000, 32)):
        with torch.device("meta"):
            network = create(name, num_classes, in_channels)
        logits = dry_run(network, torch.empty(2, in_channels, side, side, device="meta"))
        assert logits.shape == (2, num_classes)
        assert vars(network)["num_classes"] == num_classes


def trains(network: nn.Module, logits: Tensor) -> None:
    F.cross_entropy(logits.float(), torch.arange(len(logits))).backward()
    for name, parameter in network.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.isfinite().all(), name
        # A softmax over positions does not feel the bias of what it is taken of.
        assert parameter.grad.any() or ".ctx" in name, name


@pytest.mark.parametrize("name", [*SMALL, "cifar_stem_resnet18", "cifar_stem_mobilenet_v2", "cifar_stem_inception_v1"])
def test_float32_bf16_and_channels_last(name: str) -> None:
    torch.manual_seed(0)
    network = create(name, 10, 1)
    images = torch.randn(4, 1, 32, 32)
    trains(network, network(images))
    network.zero_grad()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        logits = network(images)
    assert logits.dtype == torch.bfloat16
    trains(network, logits)
    network.eval()
    with torch.no_grad():
        plain = network(images)
        network.to(memory_format=torch.channels_last)
        torch.testing.assert_close(
            network(images.contiguous(memory_format=torch.channels_last)), plain, rtol=1e-4, atol=1e-4
        )
    assert plain.isfinite().all()
    assert plain.std(0).max() > 0


@pytest.mark.slow
@pytest.mark.parametrize("name", [*SMALL, *STEMS])
def test_compiled_networks_give_the_same_logits(name: str) -> None:
    # The networks of ours have their forward in common, and dynamo compiles a function for eight callers only.
    torch._dynamo.reset()
    torch.manual_seed(0)
    network = create(name, 10).eval()
    images = torch.randn(4, 3, 32, 32)
    with torch.no_grad():
        plain = network(images)
        compiled = torch.compile(network, fullgraph=True)(images)
    torch.testing.assert_close(compiled, plain, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("name", "convolutions", "linear"),
    [
        ("cifar_resnet11_bottleneck", "fan_out", "default"),
        ("cifar_wrn_16_2", "fan_out", "zero bias"),
        ("cifar_wrn_11_8_bottleneck", "fan_out", "default"),
        ("cifar_vgg16", "fan_out", "normal"),
        ("cifar_densenet_bc_40_12", "fan_in", "default"),
        ("cifar_densenet_40_12", "fan_in", "default"),
        ("cifar_wrn_16_4_dcl", "default", "default"),
        ("cifar_shufflenetv2_x1_0", "default", "default"),
        ("cifar_mobilenet", "default", "default"),
        ("cifar_hcgnet_a1", "default", "default"),
    ],
)
def test_initialisation(name: str, convolutions: str, linear: str) -> None:
    torch.manual_seed(0)
    for path, module in create(name, 100).named_modules():
        if isinstance(module, nn.Conv2d):
            weight = module.weight.detach()
            area, count = module.kernel_size[0] ** 2, weight.numel()
            fan = area * (module.out_channels if convolutions == "fan_out" else weight.shape[1])
            # PyTorch draws from U(-b, b), b = 1 / sqrt(fan_in).
            std = math.sqrt(2 / fan) if convolutions != "default" else 1 / math.sqrt(3 * fan)
            assert abs(weight.mean().item()) < 5 * std / math.sqrt(count), path
            assert weight.std().item() == pytest.approx(std, rel=5 / math.sqrt(2 * count)), path
            # Of a normal distribution 4.6 % are beyond two standard deviations, of a uniform one none is.
            beyond = (weight.abs() > 2 * std).float().mean().item()
            if convolutions == "default":
                assert beyond == 0, path
            elif count > 2000:
                assert 0.03 < beyond < 0.06, path
        elif isinstance(module, nn.BatchNorm2d | nn.BatchNorm1d):
            assert torch.equal(module.weight, torch.ones_like(module.weight))
            assert torch.equal(module.bias, torch.zeros_like(module.bias))
            assert (module.eps, module.momentum) == (1e-5, 0.1)
        elif isinstance(module, nn.Linear):
            weight, bound = module.weight.detach(), 1 / math.sqrt(module.in_features)
            if linear == "normal":
                assert weight.std().item() == pytest.approx(0.01, rel=0.05)
                assert weight.abs().max() > 0.03
            else:
                assert weight.abs().max() <= bound
                assert weight.std().item() == pytest.approx(bound / math.sqrt(3), rel=5 / math.sqrt(weight.numel()))
            assert module.bias.any().item() == (linear == "default"), path

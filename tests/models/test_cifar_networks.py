"""Our CIFAR ResNets and Wide ResNets against the numbers and the rules of the papers' code."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.flop_counter import FlopCounterMode

from models import create, parameter_count
from models.cifar_resnet import BasicBlock, Subsample
from models.wide_resnet import PreActBlock


@pytest.mark.parametrize(
    ("name", "parameters", "mega_macs"),
    [
        ("cifar_resnet32_a", 470_004, 68.9),
        ("cifar_resnet32_b", 472_756, 69.13),
        ("cifar_resnet56_b", 861_620, 125.75),
        ("cifar_resnet110_b", 1_736_564, None),
        ("cifar_wrn_16_2", 703_284, 101.12),
        ("cifar_wrn_28_2", 1_479_220, None),
        ("cifar_wrn_40_2", 2_255_156, 327.61),
        ("cifar_wrn_28_4", 5_872_180, 845.62),
        ("cifar_wrn_28_10", 36_536_884, 5243),
    ],
)
def test_parameters_and_multiply_adds_are_the_specs(name: str, parameters: int, mega_macs: float | None) -> None:
    with torch.device("meta"):
        network = create(name, 100).eval()
        with FlopCounterMode(display=False) as counter:
            network(torch.empty(1, 3, 32, 32))
    assert parameter_count(network) == parameters
    if mega_macs is not None:
        digits = len(str(mega_macs).partition(".")[2])
        assert round(counter.get_total_flops() / 2e6, digits) == mega_macs


@pytest.mark.parametrize("name", ["cifar_resnet8_a", "cifar_resnet8_b", "cifar_wrn_10_1"])
@pytest.mark.parametrize("in_channels", [1, 3])
@pytest.mark.parametrize("num_classes", [10, 100])
@pytest.mark.parametrize("size", [28, 32])
def test_shapes(name: str, in_channels: int, num_classes: int, size: int) -> None:
    network = create(name, num_classes, in_channels)
    x = torch.randn(2, in_channels, size, size)
    stage_input = network.get_submodule("conv1")(x)
    for stage, channels, scale in (("layer1", 16, 1), ("layer2", 32, 2), ("layer3", 64, 4)):
        stage_input = network.get_submodule(stage)(stage_input)
        assert stage_input.shape == (2, channels, size // scale, size // scale)
    assert network(x).shape == (2, num_classes)


@pytest.mark.parametrize(("name", "conv_layers"), [("cifar_resnet20_a", 19), ("cifar_resnet20_b", 21)])
def test_depth_counts_the_convolutions_of_the_main_path_and_the_classifier(name: str, conv_layers: int) -> None:
    convolutions = [module for module in create(name, 10).modules() if isinstance(module, nn.Conv2d)]
    assert len(convolutions) == conv_layers


def test_width_scales_all_stages() -> None:
    network = create("cifar_resnet8_b", 10, width=8)
    assert [network.get_submodule(f"layer{i}.0.conv1").out_channels for i in (1, 2, 3)] == [8, 16, 32]
    assert network.get_submodule("fc").in_features == 32


@pytest.mark.parametrize("size", [7, 8])
def test_shortcut_a_subsamples_and_appends_zeros_without_parameters(size: int) -> None:
    shortcut = Subsample(3, 8, 2)
    x = torch.randn(2, 3, size, size)
    expected = torch.zeros(2, 8, math.ceil(size / 2), math.ceil(size / 2))
    for row in range(expected.shape[2]):
        for column in range(expected.shape[3]):
            expected[:, :3, row, column] = x[:, :, 2 * row, 2 * column]
    assert torch.equal(shortcut(x), expected)
    assert not list(shortcut.state_dict())


@pytest.mark.parametrize("shortcut", ["a", "b"])
def test_basic_block_is_relu_of_branch_plus_shortcut(shortcut: str) -> None:
    block = BasicBlock(4, 8, 2, shortcut).eval()
    x = torch.randn(2, 4, 8, 8)
    branch = F.relu(block.bn1(F.conv2d(x, block.conv1.weight, stride=2, padding=1)))
    branch = block.bn2(F.conv2d(branch, block.conv2.weight, padding=1))
    if shortcut == "a":
        side = torch.cat([x[:, :, ::2, ::2], torch.zeros(2, 4, 4, 4)], dim=1)
    else:
        convolution, norm = block.shortcut.children()
        assert isinstance(convolution, nn.Conv2d)
        side = norm(F.conv2d(x, convolution.weight, stride=2))
    torch.testing.assert_close(block(x), F.relu(branch + side))


def test_basic_block_of_one_shape_adds_its_input() -> None:
    block = BasicBlock(4, 4, 1, "b")
    nn.init.zeros_(block.bn2.weight)
    x = torch.randn(2, 4, 8, 8)
    assert torch.equal(block(x), F.relu(x))
    assert isinstance(block.shortcut, nn.Identity)


def test_pre_activation_block_takes_the_shortcut_from_the_activated_input() -> None:
    block = PreActBlock(4, 8, 2, dropout=0.0)
    nn.init.zeros_(block.conv2.weight)
    x = torch.randn(2, 4, 8, 8)
    assert block.shortcut is not None
    expected = F.conv2d(F.relu(F.batch_norm(x, None, None, training=True)), block.shortcut.weight, stride=2)
    torch.testing.assert_close(block(x), expected)
    assert (block.conv1.stride, block.conv2.stride) == ((2, 2), (1, 1))


def test_pre_activation_block_of_one_shape_adds_its_raw_input() -> None:
    block = PreActBlock(4, 4, 1, dropout=0.0)
    nn.init.zeros_(block.conv2.weight)
    x = torch.randn(2, 4, 8, 8)
    assert torch.equal(block(x), x)


def test_dropout_of_the_wide_resnet_acts_in_training_only() -> None:
    network = create("cifar_wrn_10_1", 10, dropout=0.3)
    assert {module.p for module in network.modules() if isinstance(module, nn.Dropout)} == {0.3}
    x = torch.randn(2, 3, 8, 8)
    assert not torch.equal(network(x), network(x))
    network.eval()
    assert torch.equal(network(x), network(x))


@pytest.mark.parametrize("name", ["cifar_resnet20_b", "cifar_wrn_16_2"])
def test_initialisation(name: str) -> None:
    torch.manual_seed(0)
    network = create(name, 100)
    for module in network.modules():
        if isinstance(module, nn.Conv2d):
            assert module.bias is None
            count = module.weight.numel()
            std = math.sqrt(2 / (module.out_channels * module.kernel_size[0] ** 2))
            # Five standard errors of a normal sample's mean and standard deviation.
            assert abs(module.weight.mean().item()) < 5 * std / math.sqrt(count)
            assert module.weight.std().item() == pytest.approx(std, rel=5 / math.sqrt(2 * count))
        elif isinstance(module, nn.BatchNorm2d):
            assert module.eps == 1e-5
            assert torch.equal(module.weight, torch.ones_like(module.weight))
            assert torch.equal(module.bias, torch.zeros_like(module.bias))
    linear = network.get_submodule("fc")
    assert isinstance(linear, nn.Linear)
    bound = 1 / math.sqrt(linear.in_features)
    assert 0.95 * bound < linear.weight.abs().max() <= bound
    if "wrn" in name:
        assert torch.equal(linear.bias, torch.zeros(100))
    else:
        assert 0.9 * bound < linear.bias.abs().max() <= bound


@pytest.mark.parametrize("name", ["cifar_resnet8_a", "cifar_resnet8_b", "cifar_wrn_10_2"])
def test_channels_last_and_bf16_train(name: str) -> None:
    torch.manual_seed(0)
    network = create(name, 10)
    x = torch.randn(4, 3, 32, 32)
    plain = network(x)
    network.to(memory_format=torch.channels_last)
    x = x.contiguous(memory_format=torch.channels_last)
    torch.testing.assert_close(network(x), plain, rtol=1e-4, atol=1e-4)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        logits = network(x)
    assert logits.dtype == torch.bfloat16
    F.cross_entropy(logits.float(), torch.arange(4)).backward()
    for parameter in network.parameters():
        assert parameter.grad is not None
        assert parameter.grad.isfinite().all()
        assert parameter.grad.any()

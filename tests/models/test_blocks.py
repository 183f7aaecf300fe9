"""The blocks that networks are made of, each against its equation."""

from __future__ import annotations

import re
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from models import check, create
from models.cifar_densenet import DenseLayer
from models.cifar_resnet import Bottleneck
from models.cifar_shufflenet import BasicUnit, DownUnit
from models.hcgnet import SMG, Gate
from models.layers import shuffle
from models.wide_resnet import PreActBlock
from tests.models.test_zoo import STEMS


def test_bottleneck_strides_in_its_3x3_and_projects_whenever_the_shape_changes() -> None:
    block = Bottleneck(16, 64, 2).eval()
    assert [(c.kernel_size, c.stride, c.out_channels) for c in (block.conv1, block.conv2, block.conv3)] == [
        ((1, 1), (1, 1), 16),
        ((3, 3), (2, 2), 16),
        ((1, 1), (1, 1), 64),
    ]
    x = torch.randn(2, 16, 8, 8)
    branch = F.relu(block.bn1(F.conv2d(x, block.conv1.weight)))
    branch = F.relu(block.bn2(F.conv2d(branch, block.conv2.weight, stride=2, padding=1)))
    branch = block.bn3(F.conv2d(branch, block.conv3.weight))
    convolution, norm = block.shortcut.children()
    assert isinstance(convolution, nn.Conv2d)
    torch.testing.assert_close(block(x), F.relu(branch + norm(F.conv2d(x, convolution.weight, stride=2))))
    assert isinstance(Bottleneck(16, 64, 1).shortcut, nn.Sequential)
    assert isinstance(Bottleneck(64, 64, 1).shortcut, nn.Identity)


def test_dcls_block_takes_the_shortcut_from_the_raw_input() -> None:
    block = PreActBlock(4, 8, 2, dropout=0.0, dcl=True)
    assert block.shortcut is not None
    assert block.conv2.bias is not None
    nn.init.zeros_(block.conv2.weight)
    x = torch.randn(2, 4, 8, 8)
    expected = F.conv2d(x, block.shortcut.weight, block.shortcut.bias, stride=2)
    torch.testing.assert_close(block(x), expected + block.conv2.bias[:, None, None])


@pytest.mark.parametrize("bottleneck", [False, True])
def test_dense_layer_appends_its_growth(bottleneck: bool) -> None:
    layer = DenseLayer(8, 3, bottleneck, dropout=0.0).eval()
    x = y = torch.randn(2, 8, 6, 6)
    if bottleneck:
        assert layer.conv1.out_channels == 12
        y = F.conv2d(F.relu(layer.bn1(x)), layer.conv1.weight)
    expected = F.conv2d(F.relu(layer.bn2(y)), layer.conv2.weight, padding=1)
    out = layer(x)
    assert torch.equal(out[:, :8], x)
    torch.testing.assert_close(out[:, 8:], expected)


def test_dropout_reaches_the_networks_that_have_it() -> None:
    for name, many in (("cifar_vgg16", 2), ("cifar_densenet_bc_10_12", 8), ("cifar_densenet_7_12", 5)):
        network = create(name, 10, dropout=0.2)
        assert [m.p for m in network.modules() if isinstance(m, nn.Dropout)] == [0.2] * many


def test_channel_shuffle_deals_the_groups_out_in_turn() -> None:
    x = torch.arange(6.0).view(1, 6, 1, 1)
    assert shuffle(x, 2).flatten().tolist() == [0, 3, 1, 4, 2, 5]


def test_shuffle_units_keep_one_half_or_halve_the_map() -> None:
    unit = BasicUnit(8).eval()
    x = torch.randn(2, 8, 6, 6)
    out = unit(x)
    assert torch.equal(out[:, 0::2], x[:, :4])  # dealt out by the shuffle
    torch.testing.assert_close(out[:, 1::2], unit.right(x[:, 4:]))
    assert [c.groups for c in unit.right.modules() if isinstance(c, nn.Conv2d)] == [1, 4, 1]
    down = DownUnit(8, 12).eval()
    out = down(x)
    assert out.shape == (2, 12, 3, 3)
    torch.testing.assert_close(out[:, 0::2], down.left(x))


def test_hcgnets_gate_is_the_specs_equation() -> None:
    torch.manual_seed(0)
    gate = Gate(6, 4).double()
    u = torch.randn(3, 6, 5, 5, dtype=torch.float64)

    def brc(x: Tensor, part: nn.Sequential, dilation: int) -> Tensor:
        convolution = part.get_submodule("conv")
        assert isinstance(convolution, nn.Conv2d)
        x = F.relu(F.batch_norm(x, None, None, training=True))
        return F.conv2d(x, convolution.weight, padding=dilation, dilation=dilation, groups=6)

    def pool(x: Tensor, context: nn.Conv2d) -> Tensor:
        score = torch.einsum("nchw,oc->nohw", x, context.weight[:, :, 0, 0])
        score = score.exp() / score.exp().sum((2, 3), keepdim=True)
        return torch.einsum("nchw,nohw->nc", x, score)

    def hidden(x: Tensor) -> Tensor:
        return torch.tanh(F.batch_norm(x, None, None, training=True))

    u3, u5 = brc(u, gate.conv_3x3, 1), brc(u, gate.conv_5x5, 2)
    s3, s5 = pool(u3, gate.ctx3), pool(u5, gate.ctx5)
    z = hidden(gate.fcall(torch.cat([s3, s5], 1)))
    e3, e5 = gate.fc3(z).exp(), gate.fc5(z).exp()
    new = (e3 * s3 + e5 * s5) / (e3 + e5)
    q = 1 / (1 + (-gate.fc2(hidden(gate.fc1(pool(u, gate.ctx_forget))))).exp())
    expected = u * q[:, :, None, None] + new[:, :, None, None]
    torch.testing.assert_close(gate(u), expected, rtol=1e-12, atol=1e-12)
    assert (gate.fcall.out_features, gate.fc1.out_features) == (3, 1)  # 12 // 4 and 6 // 4


def test_hcgnets_unit_and_state_are_the_specs() -> None:
    unit = SMG(24, 12)
    x = torch.randn(2, 24, 8, 8)
    out = unit(x)
    assert out.shape == (2, 36, 8, 8)
    assert torch.equal(out[:, :24], x)
    convolution = unit.conv2.get_submodule("conv")
    assert isinstance(convolution, nn.Conv2d)
    assert (convolution.in_channels, convolution.groups) == (48, 4)
    order = list(dict.fromkeys(key.partition(".")[0] for key in unit.gate.state_dict()))
    assert " ".join(order) == (
        "conv_3x3 conv_5x5 ctx3 ctx5 fcall bn_att fc3 fc5 ctx_forget bn_forget fc1 fc2"  # mcl.md 3.5
    )


@pytest.mark.parametrize("in_channels", [1, 3])
@pytest.mark.parametrize("name", STEMS)
def test_the_stem_of_small_images_keeps_their_size(name: str, in_channels: int) -> None:
    with torch.device("meta"):
        network = create(name, 10, in_channels)
        first = next(module for module in network.modules() if isinstance(module, nn.Conv2d))
    assert (first.in_channels, first.kernel_size, first.stride) == (in_channels, (3, 3), (1, 1))
    assert first(torch.empty(1, in_channels, 32, 32, device="meta")).shape[2:] == (32, 32)
    assert first.bias is None


def test_efficientnet_has_dcls_settings() -> None:
    network = create("cifar_stem_efficientnet_b3", 10)
    norms = [module for module in network.modules() if isinstance(module, nn.BatchNorm2d)]
    assert {(norm.eps, norm.momentum) for norm in norms} == {(1e-3, 0.01)}
    assert vars(network)["drop_rate"] == 0.3
    blocks = [block for stage in network.get_submodule("blocks").children() for block in stage.children()]
    rates = [getattr(block.drop_path, "drop_prob", 0.0) or 0.0 for block in blocks]
    assert rates == pytest.approx([0.2 * i / len(blocks) for i in range(len(blocks))])
    assert len(blocks) == 2 + 3 + 3 + 5 + 5 + 6 + 2


def test_inception_rescales_its_images_where_it_is_told_to() -> None:
    torch.manual_seed(0)
    plain = create("cifar_stem_inception_v1", 10).eval()
    rescaling = create("cifar_stem_inception_v1", 10, transform_input=True).eval()
    rescaling.load_state_dict(plain.state_dict())
    images = torch.randn(2, 3, 32, 32)
    mean, std = torch.tensor([[0.485, 0.456, 0.406], [0.229, 0.224, 0.225]])[:, :, None, None]
    with torch.no_grad():
        torch.testing.assert_close(rescaling(images), plain((images * std + mean - 0.5) / 0.5), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("name", "options", "in_channels", "reason"),
    [
        ("cifar_resnet110_bottleneck", {"width": True}, 3, "option 'width' is True; expected a positive integer"),
        ("cifar_resnet100_bottleneck", {}, 3, "depth 100 is not 9n+2 with n >= 1; nearest: 92, 101"),
        ("cifar_wrn_28_8_bottleneck", {}, 3, "depth 28 is not 9n+2 with n >= 1; nearest: 20, 29"),
        ("cifar_wrn_17_4_dcl", {}, 3, "depth 17 is not 6n+4 with n >= 1; nearest: 16, 22"),
        ("cifar_densenet_bc_41_12", {}, 3, "depth 41 is not 6n+4 with n >= 1; nearest: 40, 46"),
        ("cifar_densenet_41_12", {}, 3, "depth 41 is not 3n+4 with n >= 1; nearest: 40, 43"),
        (
            "cifar_vgg16",
            {"dropout": 1.5},
            3,
            "option 'dropout' is 1.5; expected a number from 0 up to, not including, 1",
        ),
        ("cifar_mobilenet", {"width": 2}, 3, "unknown option 'width'; valid: none"),
        (
            "cifar_stem_inception_v1",
            {"transform_input": True},
            1,
            "option 'transform_input' is for images of 3 channels, not 1",
        ),
        (
            "cifar_stem_inception_v1",
            {"transform_input": 2},
            3,
            "option 'transform_input' is 2; expected true or false",
        ),
        (
            "torchvision/googlenet",
            {"transform_input": True},
            1,
            "options {'transform_input': True} are not accepted: ValueError: option 'transform_input' is for images of "
            "3 channels, not 1",
        ),
        (
            "cifar_stem_efficientnet_b3",
            {"drop_rate": -1},
            3,
            "option 'drop_rate' is -1; expected a number from 0 up to, not including, 1",
        ),
    ],
)
def test_what_a_network_cannot_be_is_said(name: str, options: dict[str, Any], in_channels: int, reason: str) -> None:
    with pytest.raises(ValueError, match=f"^{re.escape(f'network {name!r}: {reason}')}$"):
        check(name, options, in_channels=in_channels)

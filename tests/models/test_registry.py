"""Names, options and error messages."""

from __future__ import annotations

import re
import subprocess
import sys
from typing import Any

import pytest
import torch
from torch import nn

from models import UnknownNetwork, check, create, names, parameter_count
from models.registry import families, register

EXPECTED = (
    "there is none of that name; expected timm/NAME, torchvision/NAME or one of ours, such as cifar_resnet8_a, "
    "cifar_wrn_16_1"
)
RESNET_OPTIONS = "groups, norm_layer, replace_stride_with_dilation, width_per_group, zero_init_residual"


@pytest.mark.parametrize("name", ["resnet50", "timm/resnet50", "timm/resnet50.a1_in1k", "torchvision/resnet50"])
def test_resnet50_by_every_form_of_name(name: str) -> None:
    with torch.device("meta"):
        network = create(name, 1000)
    assert parameter_count(network) == 25_557_032
    where = "torchvision" if name.startswith("torchvision") else "timm"
    assert type(network).__module__ == f"{where}.models.resnet"


@pytest.mark.parametrize("name", ["cifar_resnet8_a", "cifar_wrn_10_1", "timm/resnet18", "torchvision/resnet18"])
def test_classes_and_channels_are_as_asked_for(name: str) -> None:
    network = create(name, 7, 1).eval()
    assert vars(network)["num_classes"] == 7
    assert network(torch.randn(2, 1, 32, 32)).shape == (2, 7)


def test_networks_start_in_training_mode_from_the_random_state() -> None:
    for name in ("cifar_resnet8_b", "timm/test_resnet", "torchvision/squeezenet1_1"):
        torch.manual_seed(3)
        first = create(name, 5)
        torch.manual_seed(3)
        second = create(name, 5)
        assert first.training
        for key, value in first.state_dict().items():
            assert torch.equal(value, second.state_dict()[key])


def test_options_reach_the_network() -> None:
    check("timm/resnet18", {"drop_path_rate": 0.5})
    network = create("timm/test_resnet", 5, drop_rate=0.25)
    assert vars(network)["drop_rate"] == 0.25
    check("torchvision/mobilenet_v3_small", {"width_mult": 0.5})


@pytest.mark.parametrize("name", ["googlenet", "inception_v3"])
def test_networks_with_auxiliary_classifiers_give_logits_only(name: str) -> None:
    with torch.device("meta"):
        network = create(f"torchvision/{name}", 10)
        assert network(torch.empty(2, 3, 128, 128)).shape == (2, 10)
    assert not [key for key in network.state_dict() if "aux" in key.lower()]


@pytest.mark.parametrize("in_channels", [1, 5])
def test_replaced_first_convolution_of_torchvision_keeps_the_initialisation(in_channels: int) -> None:
    torch.manual_seed(0)
    network = create("torchvision/resnet18", 10, in_channels)
    first = network.get_submodule("conv1")
    assert isinstance(first, nn.Conv2d)
    assert first.weight.shape == (64, in_channels, 7, 7)
    assert first.weight.requires_grad
    assert first.weight.std().item() == pytest.approx((2 / (64 * 49)) ** 0.5, rel=0.05)
    assert first.weight.unique().numel() > 0.5 * min(first.weight.numel(), 64 * 3 * 49)


def test_a_network_without_a_first_convolution_of_three_channels_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    import torchvision

    monkeypatch.setattr(torchvision.models, "get_model", lambda name, **_: nn.Sequential(nn.Conv2d(4, 8, 3)))
    message = (
        "network 'torchvision/resnet18': in_channels 1: Sequential has no first convolution of 3 channels to replace; "
        "expected 3"
    )
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        create("torchvision/resnet18", 10, 1)


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("cifar_resnet33_a", "depth 33 is not 6n+2 with n >= 1; nearest: 32, 38"),
        ("cifar_resnet2_b", "depth 2 is not 6n+2 with n >= 1; nearest: 8"),
        ("cifar_resnet7_b", "depth 7 is not 6n+2 with n >= 1; nearest: 8"),
        ("cifar_wrn_27_10", "depth 27 is not 6n+4 with n >= 1; nearest: 22, 28"),
        ("cifar_resnet32_c", f"{EXPECTED}; nearest: cifar_resnet32_b, cifar_resnet32_a, cifar_resnet20_b"),
        ("restnet18", f"{EXPECTED}; nearest: timm/resnet18, torchvision/resnet18, timm/resnet18d"),
        (
            "torchvision/restnet50",
            f"{EXPECTED}; nearest: torchvision/resnet50, torchvision/resnet152, torchvision/resnet101",
        ),
        ("vit_b_16", f"{EXPECTED}; nearest: torchvision/vit_b_16, torchvision/vit_l_16, torchvision/vit_h_14"),
        ("timm/vit_b_16", f"{EXPECTED}; nearest: torchvision/vit_b_16, timm/"),
        ("imm/resnet18", f"{EXPECTED}; nearest: timm/resnet18, torchvision/resnet18, timm/resnet18d"),
        ("hf-hub:timm/resnet18", f"{EXPECTED}; nearest: timm/resnet18, torchvision/resnet18, timm/resnet18d"),
        ("torchvision/fasterrcnn_resnet50_fpn", EXPECTED),
        ("qqqqzzzz", EXPECTED),
        ("", EXPECTED),
        ("convnext_tiny.in2k", "timm has 'convnext_tiny' without this tag; nearest: convnext_tiny."),
    ],
)
def test_unknown_names_say_what_is_near(name: str, reason: str) -> None:
    # timm's lists grow: what ends with a separator here is the stable beginning of the message.
    end = "" if reason.endswith((" ", "/", ".")) else "$"
    for refuse in (check, lambda name: create(name, 10)):
        with pytest.raises(UnknownNetwork, match=f"^{re.escape(f'network {name!r}: {reason}')}{end}"):
            refuse(name)


@pytest.mark.parametrize(
    ("name", "options", "reason"),
    [
        ("cifar_resnet32_a", {"widht": 8}, "unknown option 'widht'; nearest: width; valid: width"),
        ("cifar_resnet32_a", {"depth": 8}, "unknown option 'depth'; nearest: width; valid: width"),
        ("cifar_resnet32_a", {"width": 0}, "option 'width' is 0; expected a positive integer"),
        ("cifar_resnet32_a", {"width": "8"}, "option 'width' is '8'; expected a positive integer"),
        ("cifar_wrn_16_2", {"width": 8}, "unknown option 'width'; valid: dropout"),
        ("cifar_wrn_16_2", {"dropout": 1}, "option 'dropout' is 1; expected a number from 0 up to, not including, 1"),
        (
            "cifar_wrn_16_2",
            {"dropout": "x"},
            "option 'dropout' is 'x'; expected a number from 0 up to, not including, 1",
        ),
        ("torchvision/resnet18", {"foo": 1}, f"unknown option 'foo'; valid: {RESNET_OPTIONS}"),
        ("torchvision/resnet18", {"num_classes": 1}, f"unknown option 'num_classes'; valid: {RESNET_OPTIONS}"),
        ("torchvision/resnet18", {"in_channels": 1}, f"unknown option 'in_channels'; valid: {RESNET_OPTIONS}"),
        ("torchvision/resnet18", {"weights": "DEFAULT"}, f"unknown option 'weights'; valid: {RESNET_OPTIONS}"),
        (
            "torchvision/resnet18",
            {"norm_layer": 3},
            "options {'norm_layer': 3} are not accepted: TypeError: 'int' object is not callable",
        ),
        # This class takes any keyword and says nothing.
        (
            "torchvision/convnext_tiny",
            {"layerscale": 1},
            "unknown option 'layerscale'; nearest: layer_scale; valid: block, layer_scale, norm_layer, "
            "stochastic_depth_prob",
        ),
        ("torchvision/regnet_y_128gf", {"foo": 1}, "unknown option 'foo'; valid: activation, block_type, "),
        ("torchvision/googlenet", {"aux_logits": True}, "unknown option 'aux_logits'; valid: blocks, dropout, "),
        ("resnet18", {"drop_path": 1}, "unknown option 'drop_path'; nearest: drop_path_rate; valid: aa_layer, "),
        ("timm/caformer_s18", {"foo": 1}, "unknown option 'foo'; valid: depths, "),
        ("timm/regnetx_002", {"foo": 1}, "unknown option 'foo'; valid: "),
        ("timm/resnet18", {"pretrained": True}, "unknown option 'pretrained'; valid: aa_layer, "),
        ("timm/resnet18", {"act_layer": "foo"}, "options {'act_layer': 'foo'} are not accepted: KeyError: 'foo'"),
    ],
)
def test_wrong_options_are_named_with_the_valid_ones(name: str, options: dict[str, Any], reason: str) -> None:
    end = "" if reason.endswith((" ", "/")) else "$"
    with pytest.raises(ValueError, match=f"^{re.escape(f'network {name!r}: {reason}')}{end}") as error:
        check(name, options)
    assert not isinstance(error.value, UnknownNetwork)


@pytest.mark.parametrize(("key", "value"), [("num_classes", 0), ("in_channels", -1), ("num_classes", 2.5)])
def test_counts_are_positive_integers(key: str, value: Any) -> None:
    message = f"network 'cifar_resnet8_a': {key} {value!r}; expected a positive integer"
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        check("cifar_resnet8_a", **{key: value})


@pytest.mark.parametrize(
    "name",
    [
        "cifar_wrn_28_10",
        "vit_huge_patch14_224",
        "vitamin_large_224",
        "torchvision/vit_h_14",
        "torchvision/regnet_y_128gf",
    ],
)
def test_check_leaves_the_random_state_alone(name: str) -> None:
    state = torch.get_rng_state()
    check(name, in_channels=1)
    assert torch.equal(torch.get_rng_state(), state)


def test_names_lists_ours_and_the_libraries() -> None:
    everything = names()
    assert len(everything) == len(set(everything)) > 1000
    assert {"cifar_resnet32_a", "cifar_wrn_28_10", "timm/resnet50", "torchvision/resnet50"} <= set(everything)
    assert "torchvision/raft_large" not in everything
    assert names("cifar_wrn_28_*") == ["cifar_wrn_28_2", "cifar_wrn_28_4", "cifar_wrn_28_10"]
    assert names("*/densenet121") == ["timm/densenet121", "torchvision/densenet121"]
    for name in names("cifar_*"):
        check(name)


def test_a_family_is_one_registration() -> None:
    before = list(families())
    try:

        @register(r"toy(?P<size>\d+)_(?P<kind>\w)", examples=["toy1_x"])
        def toy(size: int, kind: str, num_classes: int, in_channels: int, *, scale: float = 1.0) -> nn.Module:
            assert (size, kind, scale) == (12, "y", 2.0)
            return nn.Sequential(nn.Flatten(), nn.Linear(in_channels, num_classes))

        assert create("toy12_y", 5, scale=2.0)(torch.zeros(2, 3, 1, 1)).shape == (2, 5)
        assert names("toy*") == ["toy1_x"]
        with pytest.raises(UnknownNetwork, match="nearest: toy1_x"):
            check("toy_x")
        with pytest.raises(ValueError, match=r"^'toy1_x' belongs to another family already$"):
            register(r"toy1_x", examples=["toy1_x"])(toy)
        with pytest.raises(ValueError, match=r"^example 'tow' does not match 'toe'$"):
            register(r"toe", examples=["tow"])(toy)
    finally:
        families()[:] = before


def test_our_networks_come_without_importing_the_libraries() -> None:
    code = (
        "import sys, models; models.create('cifar_resnet8_a', 10); print('timm' in sys.modules, 'torchvision' in "
        "sys.modules)"
    )
    done = subprocess.run([sys.executable, "-W", "error", "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["False", "False"]

"""Parameter groups of peers against those that timm makes of the same network by itself."""

from __future__ import annotations

from typing import Any

import pytest
import timm
import timm.optim
import torch
from torch import nn

import models
from engine.cohort.optim import make_optimizer
from engine.cohort.parameter_groups import check_grouping, said_by
from engine.cohort.peer import Peer
from engine.cohort.schedule import Schedule
from engine.config import ConfigError, OptimizerConfig, ScheduleConfig
from models.stages import cut

TEN_FAMILIES = [
    "vit_tiny_patch16_224",
    "deit_tiny_distilled_patch16_224",
    "swin_tiny_patch4_window7_224",
    "swinv2_tiny_window8_256",
    "convnext_atto",
    "resnet18",
    "efficientnet_b0",
    "mixer_s32_224",
    "beit_base_patch16_224",
    "xcit_nano_12_p16_224",
    "pnasnet5large",  # its layers are told apart by their number alone
]


def settings(optimizer: torch.optim.Optimizer, module: nn.Module) -> dict[str, tuple[float, float]]:
    """{name: (weight decay, scale of the rate)}."""
    names = {p: name for name, p in module.named_parameters()}
    return {
        names[p]: (group["weight_decay"], group.get("lr_scale", 1.0))
        for group in optimizer.param_groups
        for p in group["params"]
    }


@pytest.mark.parametrize("decay_norm_and_bias", [True, False])
@pytest.mark.parametrize("options", [{}, {"layer_decay": 0.75}, {"layer_decay": 0.5, "layer_decay_min_scale": 0.1}])
@pytest.mark.parametrize("name", TEN_FAMILIES)
def test_a_peer_has_the_groups_that_timm_gives_its_network(
    name: str, options: dict[str, Any], decay_norm_and_bias: bool
) -> None:
    with torch.device("meta"):
        network, head = timm.create_model(name, num_classes=10), nn.Linear(3, 2)
    config = OptimizerConfig(
        name="adamw", lr=1e-3, weight_decay=0.05, decay_norm_and_bias=decay_norm_and_bias, options=options
    )
    own = timm.optim.create_optimizer_v2(
        network, opt="adamw", lr=1e-3, weight_decay=0.05, filter_bias_and_bn=not decay_norm_and_bias, **options
    )
    expected = {f"network.{key}": value for key, value in settings(own, network).items()}
    expected |= {"head.weight": (0.05, 1.0), "head.bias": (0.05 if decay_norm_and_bias else 0.0, 1.0)}
    peer = Peer(network, head, None, ())
    assert settings(make_optimizer(peer, config, said_by(network, config)), peer) == expected


def test_a_trunk_that_is_cut_off_keeps_the_groups_of_the_whole() -> None:
    config = OptimizerConfig(name="adamw", lr=1e-3, weight_decay=0.05, options={"layer_decay": 0.5})
    with torch.device("meta"):
        network = timm.create_model("swin_tiny_patch4_window7_224", num_classes=10)
    own = timm.optim.create_optimizer_v2(
        network, opt="adamw", lr=1e-3, weight_decay=0.05, filter_bias_and_bn=False, layer_decay=0.5
    )
    expected, said = settings(own, network), said_by(network, config)
    trunk, branch = cut(network, "layers.1")
    found = settings(make_optimizer(trunk, config, said), trunk)
    assert min(scale for _, scale in found.values()) < 0.01
    assert found | settings(make_optimizer(branch, config, said), branch) == expected
    tables = [name for name in expected if name.endswith("relative_position_bias_table")]
    assert tables
    assert {expected[name][0] for name in tables} == {0}


def test_the_rate_of_a_layer_is_scaled_at_every_update() -> None:
    network = models.create("timm/test_vit", 10, 1, img_size=28)
    config = OptimizerConfig(name="adamw", lr=0.8, options={"layer_decay": 0.5})
    optimizer = make_optimizer(network, config)
    schedule = Schedule(optimizer, ScheduleConfig(name="step", milestones=[1.0], gamma=0.5), 2, 1)
    scales = sorted({group["lr_scale"] for group in optimizer.param_groups})
    assert scales == [0.5**k for k in range(len(scales) - 1, -1, -1)]
    for step, base in ((0, 0.8), (1, 0.4)):
        schedule.step_update(step)
        assert all(group["lr"] == pytest.approx(base * group["lr_scale"]) for group in optimizer.param_groups)


@pytest.mark.parametrize("name", ["cifar_resnet8_a", "torchvision/resnet18"])
def test_a_network_that_does_not_say_its_layers_is_refused(name: str) -> None:
    config = OptimizerConfig(options={"layer_decay": 0.75})
    with pytest.raises(ConfigError, match=rf"^optimizer\.options\.layer_decay = 0\.75: {name} does not say"):
        check_grouping(models.create(name, 10), name, config)
    check_grouping(models.create("timm/resnet18", 10), "timm/resnet18", config)

"""Images and batches that a network cannot take are refused without weights."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import models

AS_IT_IS = "takes no images of {} pixels as it is; expected options: {{{}: {}}}"
SIZES: dict[str, Any] = {"num_classes": 10, "in_channels": 3, "count": 4}


@pytest.mark.parametrize(
    ("name", "options", "side", "count", "reason"),
    [
        (
            "timm/vit_tiny_patch16_224",
            {},
            96,
            4,
            AS_IT_IS.format(96, "img_size", 96),
        ),
        (
            "timm/vit_tiny_patch16_224",
            {},
            28,
            4,
            AS_IT_IS.format(28, "img_size", 28),
        ),
        (
            "torchvision/vit_b_16",
            {},
            96,
            4,
            AS_IT_IS.format(96, "image_size", 96),
        ),
        ("timm/vgg11", {}, 1, 4, "cannot be trained on images of 1 pixels: .*; it was made for 224 pixels"),
        ("torchvision/alexnet", {}, 28, 4, "cannot be trained on images of 28 pixels: "),
        ("timm/inception_v3", {"aux_logits": True}, 299, 4, "it gives a tuple instead of logits in training"),
        (
            "torchvision/resnet18",
            {},
            32,
            1,
            "cannot be trained on 1 image at a time: .*; expected 2 or more",
        ),
    ],
)
def test_what_cannot_be_trained_is_refused(
    name: str, options: dict[str, Any], side: int, count: int, reason: str
) -> None:
    with pytest.raises(ValueError, match=reason) as error:
        models.try_images(name, options, **{**SIZES, "side": side, "count": count})
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("name", "options", "side", "count"),
    [
        ("timm/vit_tiny_patch16_224", {"img_size": 96}, 96, 4),
        ("timm/resnet18", {}, 224, 1),  # 7 x 7 values of a channel are enough for its statistics
        ("timm/deit_tiny_distilled_patch16_224", {}, 224, 2),
        ("timm/regnety_002", {}, 64, 2),
        ("torchvision/regnet_y_400mf", {}, 64, 2),
        ("torchvision/inception_v3", {}, 96, 2),
        ("cifar_resnet20_a", {}, 28, 1),
        ("timm/resnetv2_50x1_bit", {}, 64, 2),
    ],
)
def test_what_can_be_trained_is_let_through_and_costs_no_random_number(
    name: str, options: dict[str, Any], side: int, count: int
) -> None:
    before = torch.get_rng_state()
    models.try_images(name, options, **{**SIZES, "side": side, "count": count})
    assert torch.equal(torch.get_rng_state(), before)

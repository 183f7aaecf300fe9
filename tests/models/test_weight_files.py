"""Checkpoints of other trainers as a start."""

from __future__ import annotations

import argparse
import logging
import re
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from torch import Tensor, nn

from models import WeightsError, check, create

NAME, CLASSES, CHANNELS = "timm/test_resnet", 10, 1


@pytest.fixture(scope="module")
def origin() -> dict[str, Tensor]:
    torch.manual_seed(1)
    return dict(timm.create_model("test_resnet", num_classes=CLASSES, in_chans=CHANNELS).state_dict())


def prefixed(state: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {f"{prefix}{name}": tensor for name, tensor in state.items()}


def zeros(state: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: torch.zeros_like(tensor) for name, tensor in state.items()}


ARGUMENTS = argparse.Namespace(model="test_resnet", lr=0.1)
FILES: dict[str, Any] = {
    "plain.pth.tar": lambda w: w,
    "pytorch_model.bin": lambda w: w,
    "ddp.pth": lambda w: prefixed(w, "module."),
    "compiled.pth": lambda w: prefixed(w, "_orig_mod."),
    "both.pth": lambda w: prefixed(w, "_orig_mod.module."),
    # PyTorch's example for ImageNet.
    "model_best.pth.tar": lambda w: {
        "epoch": 3,
        "arch": "test_resnet",
        "state_dict": prefixed(w, "module."),
        "best_acc1": torch.tensor(12.5),
        "scheduler": {"last_epoch": 3},
    },
    # timm's train.py: the average is what it validates and loads.
    "timm.pth": lambda w: {"epoch": 3, "state_dict": zeros(w), "state_dict_ema": w, "args": ARGUMENTS, "metric": 12.5},
    # torchvision's reference scripts, with and without an average.
    "torchvision.pth": lambda w: {"model": w, "epoch": 3, "args": ARGUMENTS},
    "torchvision_ema.pth": lambda w: {
        "model": zeros(w),
        "model_ema": {"n_averaged": torch.tensor(3), **prefixed(w, "module.")},
    },
    "torchvision_counter.pth": lambda w: {"model": w, "model_ema": {"n_averaged": torch.tensor(3)}},
    "lightning.ckpt": lambda w: {
        "state_dict": {**prefixed(w, "model."), "criterion.weight": torch.ones(10)},
        "hyper_parameters": {"lr": 0.1},
    },
    "own_module.ckpt": lambda w: {"state_dict": prefixed(w, "student.backbone.")},
    "legacy.pth": lambda w: w,
}


@pytest.mark.parametrize("file", FILES)
def test_what_other_trainers_leave_is_read(file: str, origin: dict[str, Tensor], tmp_path: Path) -> None:
    path = tmp_path / file
    torch.save(FILES[file](origin), path, _use_new_zipfile_serialization=not file.startswith("legacy"))
    check(NAME, num_classes=CLASSES, in_channels=CHANNELS, pretrained=str(path))
    found = create(NAME, CLASSES, CHANNELS, pretrained=str(path)).state_dict()
    assert [name for name, tensor in origin.items() if not torch.equal(tensor, found[name])] == []


def test_which_weights_were_taken_is_said_once_at_the_start_and_not_at_the_check(
    origin: dict[str, Tensor], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    for file in ("timm.pth", "lightning.ckpt"):
        torch.save(FILES[file](origin), tmp_path / file)
        check(NAME, num_classes=CLASSES, in_channels=CHANNELS, pretrained=str(tmp_path / file))
        assert not caplog.messages
        with caplog.at_level(logging.WARNING, "models"):
            create(NAME, CLASSES, CHANNELS, pretrained=str(tmp_path / file))
        said = {
            "timm.pth": "the weights are those of 'state_dict_ema'; it holds 'state_dict_ema', 'state_dict'",
            "lightning.ckpt": "not of the network, not used: criterion.weight",
        }
        assert caplog.messages == [f"ResNet from {tmp_path / file}: {said[file]}"]
        caplog.clear()


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (lambda w: {"teacher": w, "student": w}, r"found 'teacher', 'student'$"),
        (
            lambda w: nn.Linear(1, 1),
            r"cannot be read: it holds objects \(torch\.nn\.modules\.linear\.Linear\), and nothing in a file is "
            r"executed; save the network's state_dict\(\) alone, or as safetensors$",
        ),
    ],
)
def test_what_cannot_be_read_says_why_in_one_line(
    content: Any, reason: str, origin: dict[str, Tensor], tmp_path: Path
) -> None:
    torch.save(content(origin), tmp_path / "weights.pth")
    with pytest.raises(WeightsError, match=reason) as error:
        check(NAME, num_classes=CLASSES, in_channels=CHANNELS, pretrained=str(tmp_path / "weights.pth"))
    assert not re.search(r"[\x00-\x1f]", str(error.value))


@pytest.mark.filterwarnings("ignore::UserWarning")  # timm's own, when it resamples
@pytest.mark.parametrize(
    ("name", "before", "after"),
    [
        ("test_vit", {}, {"img_size": 96}),
        ("test_vit", {}, {"patch_size": 8}),
        ("test_vit", {}, {"img_size": 96, "patch_size": 8}),
        ("swin_tiny_patch4_window7_224", {"depths": (1, 1, 1, 1)}, {"depths": (1, 1, 1, 1), "window_size": 8}),
    ],
)
def test_a_transformer_for_other_images_gets_what_timm_would_give_it(
    name: str, before: dict[str, Any], after: dict[str, Any], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    if "window_size" in after:
        after = {**after, "img_size": 256}
    torch.manual_seed(2)
    path = tmp_path / "weights.pth"
    torch.save(timm.create_model(name, num_classes=10, **before).state_dict(), path)
    overlay = {"file": str(path), "num_classes": 10, "hf_hub_id": None, "url": None}
    expected = timm.create_model(
        name, pretrained=True, num_classes=10, in_chans=1, pretrained_cfg_overlay=overlay, **after
    ).state_dict()
    check(f"timm/{name}", after, num_classes=10, in_channels=1, pretrained=str(path))
    with caplog.at_level(logging.WARNING, "models"):
        found = create(f"timm/{name}", 10, 1, pretrained=str(path), **after).state_dict()
    assert [key for key in expected if not torch.equal(expected[key], found[key])] == []
    assert ": made to fit: " in caplog.messages[0]
    assert "patch_embed.proj.weight" in caplog.messages[0]


def test_three_channels_are_summed_up_for_one(tmp_path: Path) -> None:
    """w [O, 3, H, W] to [O, 1, H, W]: on a grey image, shown three times, both give the same."""
    origin = create("torchvision/resnet18", 10)
    torch.save(origin.state_dict(), tmp_path / "weights.pt")
    grey = create("torchvision/resnet18", 10, 1, pretrained=str(tmp_path / "weights.pt"))
    images = torch.randn(2, 1, 64, 64)
    with torch.inference_mode():
        torch.testing.assert_close(
            grey.eval()(images), origin.eval()(images.expand(-1, 3, -1, -1)), rtol=1e-3, atol=1e-4
        )

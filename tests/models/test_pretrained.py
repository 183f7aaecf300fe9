"""Pre-trained weights from files, and what is said where there are none."""

from __future__ import annotations

import logging
import re
import subprocess
import sys
import urllib.request
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from models import UnknownNetwork, WeightsError, check, create
from models.libraries import build_from_library
from models.pretrained import Published, load_published

STATES: list[tuple[str, Callable[[dict[str, Tensor], Path], None]]] = [
    (".safetensors", lambda state, path: save_file(state, path)),
    (".pt", lambda state, path: torch.save(state, path)),
    (".pth", lambda state, path: torch.save({"state_dict": state, "epoch": 3}, path)),
]


def saved(network: nn.Module, path: Path, **changes: Tensor | None) -> str:
    state = {name: tensor for name, tensor in (network.state_dict() | changes).items() if tensor is not None}
    (save_file if path.suffix == ".safetensors" else torch.save)(state, path)  # type: ignore[operator]
    return str(path)


def equal_but_for(one: nn.Module, other: nn.Module) -> list[str]:
    theirs = other.state_dict()
    return [
        name
        for name, tensor in one.state_dict().items()
        if tensor.shape != theirs[name].shape or not torch.equal(tensor, theirs[name])
    ]


@pytest.mark.parametrize(("suffix", "write"), STATES)
@pytest.mark.parametrize(
    "name", ["cifar_resnet8_b", "cifar_stem_mobilenet_v2", "timm/test_resnet", "torchvision/squeezenet1_1"]
)
def test_a_file_is_loaded_whole(
    name: str, suffix: str, write: Callable[[dict[str, Tensor], Path], None], tmp_path: Path
) -> None:
    torch.manual_seed(0)
    origin = create(name, 10, 1)
    write(origin.state_dict(), tmp_path / f"weights{suffix}")
    path = str(tmp_path / f"weights{suffix}")
    check(name, num_classes=10, in_channels=1, pretrained=path)
    network = create(name, 10, 1, pretrained=path)
    assert equal_but_for(network, origin) == []
    assert network.training
    assert equal_but_for(create(name, 10, 1), origin)


@pytest.mark.parametrize(
    ("name", "classifier"),
    [
        ("cifar_wrn_10_1", "fc"),
        ("cifar_vgg16", "classifier.6"),
        ("timm/test_resnet", "fc"),
        ("timm/mobilenetv1_100", "classifier"),
        ("torchvision/resnet18", "fc"),
        ("torchvision/squeezenet1_1", "classifier.1"),
    ],
)
def test_a_classifier_of_other_classes_stays_as_it_was_and_that_is_said(
    name: str, classifier: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    torch.manual_seed(0)
    origin = create(name, 10)
    path = saved(origin, tmp_path / "weights.safetensors")
    check(name, num_classes=7, pretrained=path)
    torch.manual_seed(1)
    fresh = create(name, 7)
    torch.manual_seed(1)
    with caplog.at_level(logging.WARNING, "models"):
        network = create(name, 7, pretrained=path)
    left = [f"{classifier}.weight", f"{classifier}.bias"]
    assert equal_but_for(network, origin) == left
    for tensor in left:
        assert torch.equal(network.state_dict()[tensor], fresh.state_dict()[tensor])
    assert caplog.messages == [
        f"{type(network).__name__} from {path}: {', '.join(left)} stay at their random initialisation"
    ]


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"fc.bias": None}, "fc.bias is missing"),
        ({"conv1.weight": torch.zeros(16, 1, 3, 3)}, "conv1.weight is [16, 1, 3, 3] and should be [16, 3, 3, 3]"),
        ({"fc.weight": torch.zeros(7, 65)}, "fc.weight is [7, 65] and should be [10, 64]"),
        ({"head.bias": torch.zeros(3)}, "head.bias is no tensor of this network"),
        (
            dict.fromkeys((f"layer{i}.0.bn1.bias" for i in (1, 2, 3)), None) | {"fc.bias": None},
            "layer1.0.bn1.bias is missing; layer2.0.bn1.bias is missing; layer3.0.bn1.bias is missing (and 1 more)",
        ),
    ],
)
def test_weights_of_another_network_are_refused(changes: dict[str, Tensor | None], reason: str, tmp_path: Path) -> None:
    path = saved(create("cifar_resnet8_b", 10), tmp_path / "weights.pt", **changes)
    message = f"network 'cifar_resnet8_b': pretrained: {path} belong to another network: {reason}"
    for refuse in (
        lambda: check("cifar_resnet8_b", num_classes=10, pretrained=path),
        lambda: create("cifar_resnet8_b", 10, pretrained=path),
    ):
        with pytest.raises(WeightsError, match=f"^{re.escape(message)}$"):
            refuse()


def test_files_without_the_counters_of_batch_norm_load(tmp_path: Path) -> None:
    origin = create("cifar_resnet8_b", 10)
    counters = dict.fromkeys((name for name in origin.state_dict() if name.endswith("num_batches_tracked")), None)
    path = saved(origin, tmp_path / "old.pth", **counters)
    assert len(counters) == 9
    assert equal_but_for(create("cifar_resnet8_b", 10, pretrained=path), origin) == []


class Evil:
    def __reduce__(self) -> tuple[Any, ...]:
        return print, ("executed",)


@pytest.mark.parametrize(
    ("file", "content", "reason"),
    [
        ("none.pt", None, "there is no such file"),
        ("cut.safetensors", b"\x08\x00", "cannot be read: "),
        ("cut.pth", b"PK\x03\x04", "cannot be read: "),
        ("evil.pt", {"weight": Evil()}, "cannot be read: "),
        ("numbers.pt", {"weight": 3}, "holds no tensors by name; expected a network's state_dict"),
        ("empty.pt", {}, "holds no tensors by name; expected a network's state_dict"),
    ],
)
def test_files_that_are_no_weights_are_named(
    file: str, content: Any, reason: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / file
    if isinstance(content, bytes):
        path.write_bytes(content)
    elif content is not None:
        torch.save(content, path)
    message = f"network 'timm/test_resnet': pretrained {str(path)!r}: {reason}"
    with pytest.raises(WeightsError, match=f"^{re.escape(message)}") as error:
        check("timm/test_resnet", pretrained=str(path))
    assert "\n" not in str(error.value)
    assert "executed" not in capsys.readouterr().out


@pytest.mark.parametrize("value", [1, None, "weights", "weights.npz", ""])
def test_pretrained_is_a_bool_or_a_file(value: Any) -> None:
    message = (
        f"network 'timm/resnet18': pretrained {value!r}; expected true, false or the path of a file that ends in "
        ".safetensors, .pt, .pth, .pth.tar, .bin, .ckpt"
    )
    for refuse in (check, lambda name, **rest: create(name, 10, **rest)):
        with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
            refuse("timm/resnet18", pretrained=value)


NOBODY = "pretrained: true; nobody publishes weights of it; expected false or the path of a file"
RESCALED = "pretrained: true; its weights expect rescaled images, and so the option transform_input: true"


@pytest.mark.parametrize(
    ("name", "in_channels", "reason"),
    [
        ("cifar_resnet8_b", 3, NOBODY),
        ("cifar_stem_efficientnet_b3", 3, NOBODY),
        ("timm/resnet18.none", 3, "timm has 'resnet18' without this tag"),
        ("timm/resnest18d", 3, "there is none of that name"),
        ("timm/test_convnext", 3, ""),
        ("timm/vit_tiny_patch16_384", 3, ""),
        ("timm/resnet18", 1, ""),
        ("torchvision/resnet18", 3, ""),
        ("torchvision/resnet18", 1, ""),
        ("torchvision/inception_v3", 3, RESCALED),
        ("cifar_stem_inception_v1", 3, RESCALED),
        ("cifar_stem_inception_v1", 1, f"{RESCALED}, which is for images of 3 channels"),
        ("cifar_stem_resnet18", 1, ""),
        ("timm/resnet14t", 3, ""),
        ("timm/vit_small_patch16_18x2_224", 3, "pretrained: true; timm has no weights of it; expected false or "),
    ],
)
def test_whether_there_are_published_weights_is_known_without_a_download(
    name: str, in_channels: int, reason: str
) -> None:
    if not reason:
        check(name, in_channels=in_channels, pretrained=True)
        return
    with pytest.raises((WeightsError, UnknownNetwork), match=f"^{re.escape(f'network {name!r}: {reason}')}"):
        check(name, in_channels=in_channels, pretrained=True)


def test_rescaling_makes_inception_take_its_weights() -> None:
    for name in ("cifar_stem_inception_v1", "torchvision/googlenet"):
        check(name, {"transform_input": True}, pretrained=True)


# Without a network, which is what a failing download is; huggingface_hub would try for a minute. Nothing is cached.
OFFLINE = """
import os, socket, sys
os.environ |= {"HF_HOME": sys.argv[1], "TORCH_HOME": sys.argv[1]}
def refuse(*_, **__):
    raise OSError("no network here")
socket.getaddrinfo = refuse
import models
for name in sys.argv[2:]:
    try:
        models.create(name, 10, pretrained=True)
    except models.WeightsError as error:
        print(error)
"""


def test_a_download_that_fails_says_what_to_do(tmp_path: Path) -> None:
    names = ("timm/test_resnet", "torchvision/resnet18", "cifar_stem_mobilenet_v2")
    done = subprocess.run(
        [sys.executable, "-c", OFFLINE, str(tmp_path), *names], capture_output=True, text=True, check=True
    )
    said = [line for line in done.stdout.splitlines() if not line.startswith("Downloading: ")]
    for name, line in zip(names, said, strict=True):
        assert re.fullmatch(
            rf"network '{name}': pretrained: true; its weights cannot be downloaded: [\w.]+ does not answer: no "
            r"network here; without a network, fetch https://[\w./-]+ elsewhere and give `pretrained` the path of that "
            r"file \(\.safetensors, \.pt, .*\)",
            line,
        )
    assert not list(tmp_path.rglob("*.pth"))


def no_download(*_: object, **__: object) -> None:
    raise AssertionError("nobody asked for a download")


def test_nothing_is_downloaded_without_being_asked_for(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(urllib.request, "urlopen", no_download)
    path = saved(create("torchvision/resnet18", 10), tmp_path / "weights.safetensors")
    for pretrained in (False, path):
        create("torchvision/resnet18", 10, pretrained=pretrained)
        check("cifar_stem_resnet18")
        check("torchvision/resnet18", pretrained=True)


def test_torchvisions_published_weights_are_loaded_where_they_are_cached(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """What torchvision has downloaded once, it reads from its cache; here the cache holds our own weights."""
    import torchvision

    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    monkeypatch.setattr(urllib.request, "urlopen", no_download)
    torch.manual_seed(0)
    origin = torchvision.models.get_model("resnet18", weights=None)
    cache = tmp_path / "hub" / "checkpoints"
    cache.mkdir(parents=True)
    torch.save(origin.state_dict(), cache / "resnet18-f37072fd.pth")
    # A cached file is trusted by its name, but where its hash is checked.
    weights = torchvision.models.ResNet18_Weights.DEFAULT
    assert weights.url.endswith("resnet18-f37072fd.pth")
    network = create("torchvision/resnet18", 1000, pretrained=True)
    assert equal_but_for(network, origin) == []
    assert not caplog.messages
    assert equal_but_for(create("torchvision/resnet18", 10, pretrained=True), origin) == ["fc.weight", "fc.bias"]
    caplog.clear()
    grey = create("torchvision/resnet18", 1000, 1, pretrained=True)
    assert equal_but_for(grey, origin) == ["conv1.weight"]
    summed = origin.state_dict()["conv1.weight"].double().sum(1, keepdim=True).float()
    torch.testing.assert_close(grey.state_dict()["conv1.weight"], summed)
    assert caplog.messages.pop() == "ResNet from the published weights: made to fit: conv1.weight"
    for in_channels in (1, 3):
        small = create("cifar_stem_resnet18", 1000, in_channels, pretrained=True)
        assert equal_but_for(small, origin) == ["conv1.weight", "fc.weight", "fc.bias"]
        assert caplog.messages.pop() == (
            "ResNet from the published weights: conv1.weight, fc.weight, fc.bias stay at their random initialisation"
        )


def test_timms_published_weights_keep_the_random_state_and_the_classifier(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """timm reads a file instead of downloading where its configuration of a network names one; here it names ours."""
    import timm

    torch.manual_seed(0)
    origin = timm.create_model("test_resnet", pretrained=False)
    path = saved(origin, tmp_path / "weights.safetensors")
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")  # or whether the Hub answers would be asked
    create_model = timm.create_model
    monkeypatch.setattr(
        timm,
        "create_model",
        lambda name, pretrained, **rest: create_model(
            name, pretrained=pretrained, **({"pretrained_cfg_overlay": {"file": path}} if pretrained else {}), **rest
        ),
    )
    assert equal_but_for(create("timm/test_resnet", 1000, pretrained=True), origin) == []
    torch.manual_seed(3)
    plain, after = create("timm/test_resnet", 10), torch.rand(1)
    torch.manual_seed(3)
    network = create("timm/test_resnet", 10, pretrained=True)
    assert torch.equal(torch.rand(1), after)
    assert equal_but_for(network, origin) == ["fc.weight", "fc.bias"]
    assert torch.equal(network.get_submodule("fc").weight, plain.get_submodule("fc").weight)  # type: ignore[arg-type]
    # timm adds up the colours where there is one channel only.
    caplog.clear()
    gray = create("timm/test_resnet", 1000, 1, pretrained=True)
    assert caplog.messages == ["ResNet from the published weights: made to fit: conv1.0.weight"]
    first = next(name for name, module in gray.named_modules() if isinstance(module, nn.Conv2d))
    assert equal_but_for(gray, origin) == [f"{first}.weight"]
    torch.testing.assert_close(
        gray.state_dict()[f"{first}.weight"], origin.state_dict()[f"{first}.weight"].sum(1, keepdim=True)
    )


def test_published_weights_that_do_not_fit_are_refused() -> None:
    network = create("cifar_resnet8_b", 10)
    other = build_from_library("torchvision", "resnet18", 10, 3, {})
    with pytest.raises(
        WeightsError, match=r"^pretrained: the published weights belong to another network: conv1\.weight "
    ):
        load_published(network, Published(lambda _: other.state_dict(), ""))

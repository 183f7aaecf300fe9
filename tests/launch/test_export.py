"""Promise 5: a peer that leaves is an ordinary network."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

import models
from engine.config.loading import load
from engine.safety.checkpoint import folder_of
from engine.safety.loading import read_state
from tests.launch.command import run_command
from tests.marks import slow
from tests.runs import small_run, train_here
from tests.worlds import run_ranks


@pytest.fixture(scope="module")
def run(tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three peers from three sources, trained over three ranks, with moving averages."""
    folder = tmp_path_factory.mktemp("exported")
    peers: list[dict[str, Any]] = [
        {"network": "cifar_resnet8_b", "name": "ours", "options": {"width": 4}},
        {"network": "timm/test_resnet", "name": "timms"},
        {"network": "torchvision/shufflenet_v2_x0_5", "name": "torchvisions"},
    ]
    run_ranks(3, train_here, small_run(tiny, folder, train={"epochs": 1, "ema_decay": 0.9}, peers=peers))
    return folder


@pytest.mark.parametrize("ema", [slow(False), True])
def test_exported_weights_are_those_of_the_peer(run: Path, ema: bool) -> None:
    run_command("export", str(run), *(["--ema"] if ema else []))
    for name in ("ours", "timms", "torchvisions"):
        state = read_state(folder_of(run, 5), f"peer_{name}.pt")["ema" if ema else "network"]
        written = load_file(run / "export" / f"{name}{'-ema' if ema else ''}.safetensors")
        assert written.keys() == state.keys()
        assert all(torch.equal(written[key], state[key]) for key in state)


def test_both_files_may_be_read_by_the_same_people(run: Path, tmp_path: Path) -> None:
    before = os.umask(0o027)
    try:
        run_command("export", str(run), "--peer", "ours", "--out", str(tmp_path))
    finally:
        os.umask(before)
    assert {path.suffix: path.stat().st_mode & 0o777 for path in tmp_path.iterdir()} == {
        ".json": 0o640,
        ".safetensors": 0o640,
    }


def test_exported_timm_network_loads_without_the_project(run: Path, tmp_path: Path) -> None:
    run_command("export", str(run), "--peer", "timms", "--out", str(tmp_path))
    card = json.loads((tmp_path / "timms.json").read_text())
    images = torch.randn(3, 1, 28, 28)
    torch.save(images, tmp_path / "images.pt")
    script = (
        "import sys, torch, timm, safetensors.torch\n"
        f"{card['load']}\n"
        "network.eval()\n"
        "torch.save(network(torch.load('images.pt')).detach(), 'logits.pt')\n"
        "assert not {'engine', 'models', 'losses'} & set(sys.modules)\n"
    )
    subprocess.run(
        [sys.executable, "-P" if sys.version_info >= (3, 11) else "-s", "-c", script], cwd=tmp_path, check=True
    )
    with torch.inference_mode():
        expected = models.load_network(tmp_path / "timms.json")(images)
    # Not to the last bit: the two processes may split their sums among other numbers of threads.
    torch.testing.assert_close(torch.load(tmp_path / "logits.pt"), expected, rtol=1e-5, atol=1e-6)


def test_card_tells_what_a_user_of_the_network_needs(run: Path) -> None:
    run_command("export", str(run), "--peer", "ours")
    card = json.loads((run / "export" / "ours.json").read_text())
    assert card["architecture"] == {
        "name": "cifar_resnet8_b",
        "num_classes": 10,
        "in_channels": 1,
        "options": {"width": 4},
    }
    assert card["input"] == {"size": 28, "mean": [0.286], "std": [0.353]}
    assert card["classes"][9] == "Ankle boot"
    assert card["trained"]["method"] == "dml"
    assert card["trained"]["step"] == 5
    assert 0 <= card["trained"]["top1"] <= 100


def test_torchvision_network_of_three_channels_loads_in_torchvision(tmp_path: Path) -> None:
    import safetensors.torch
    import torchvision

    network = models.create("torchvision/resnet18", 10).eval()
    models.save_network(
        network,
        tmp_path / "r.json",
        {"name": "torchvision/resnet18", "num_classes": 10, "in_channels": 3, "options": {}},
        {},
    )
    plain = torchvision.models.get_model("resnet18", num_classes=10).eval()
    plain.load_state_dict(safetensors.torch.load_file(tmp_path / "r.safetensors"))
    images = torch.randn(2, 3, 64, 64)
    with torch.inference_mode():
        assert torch.equal(plain(images), network(images))
    assert (
        "torchvision.models.get_model('resnet18', num_classes=10)"
        in json.loads((tmp_path / "r.json").read_text())["load"]
    )


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"weights": "../x.safetensors"}, "names weights outside its own folder: '../x.safetensors'"),
        ({"format": "other"}, "not a cohort-network of version 1"),
        ({"version": 2}, "not a cohort-network of version 1"),
    ],
)
def test_card_that_is_not_ours_is_refused(tmp_path: Path, change: dict[str, Any], message: str) -> None:
    architecture = {"name": "cifar_resnet8_b", "num_classes": 10, "in_channels": 1, "options": {"width": 4}}
    path = tmp_path / "n.json"
    models.save_network(models.create("cifar_resnet8_b", 10, 1, width=4), path, architecture, {})
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    with pytest.raises(models.ExportError) as error:
        models.load_network(path)
    assert str(error.value) == f"{path}: {message}"


def test_weights_of_another_network_are_refused(tmp_path: Path) -> None:
    architecture = {"name": "cifar_resnet8_b", "num_classes": 10, "in_channels": 1, "options": {"width": 8}}
    path = tmp_path / "n.json"
    models.save_network(models.create("cifar_resnet8_b", 10, 1, width=4), path, architecture, {})
    with pytest.raises(models.ExportError, match="cannot be loaded into cifar_resnet8_b"):
        models.load_network(path)


def test_mistakes_are_named(run: Path, tmp_path: Path) -> None:
    code, out, err = run_command("export", str(run), "--peer", "our", check=False)
    assert (code, out) == (2, "")
    assert err == f"error: --peer our: {run} has the peers ours, timms, torchvisions; did you mean 'ours'?\n"
    code, _, err = run_command("export", str(run), "--checkpoint", "7", check=False)
    assert code == 2
    assert err == f"error: --checkpoint 7: expected newest, best or a step; {run} has the steps 5\n"
    code, _, err = run_command("export", str(tmp_path), check=False)
    assert code == 2
    assert err == (
        f"error: {tmp_path}: not a run's folder: it has no config.yaml; expected a folder that train.py wrote\n"
    )


@pytest.mark.parametrize(("command", "option"), [("export", "--out"), ("report", "--out"), ("evaluate", "--json")])
def test_where_nothing_can_be_written_that_is_said_with_the_path(
    run: Path, tmp_path: Path, command: str, option: str
) -> None:
    (tmp_path / "file").touch()
    code, _, err = run_command(command, str(run), option, str(tmp_path / "file" / "x"), check=False)
    assert code == 1
    said = err.splitlines()[-1]
    assert re.fullmatch(rf"error: {tmp_path}/file(/x[.a-z]*)?: (Not a directory|File exists)", said), err


def test_config_of_the_run_is_complete(run: Path) -> None:
    assert [name for name, _ in load(run / "config.yaml").cohort] == ["ours", "timms", "torchvisions"]

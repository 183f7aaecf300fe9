"""What the pages work out, done as they say: one's own photographs; a network and a method of one's own."""

from __future__ import annotations

import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from tests.data_pipelines.files import write_photos
from tests.launch.command import run_command

ROOT = Path(__file__).parents[2]


def blocks(page: str, language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", (ROOT / "docs" / page).read_text("utf-8"), re.DOTALL)


@pytest.mark.slow
def test_photographs_of_ones_own_are_trained_on_compared_and_exported_by_the_page(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_photos(tmp_path / "flowers")
    config = yaml.safe_load(blocks("data.md", "yaml")[0])
    config["data"] |= {"root": "flowers", "global_batch": 8, "image": {"size": 32, "resize": 36}}
    config["peers"][0]["network"] = "timm/test_resnet"
    (tmp_path / "flowers.yaml").write_text(yaml.safe_dump(config))
    monkeypatch.chdir(tmp_path)
    page = (ROOT / "docs/data.md").read_text("utf-8")
    commands = [shlex.split(line) for line in re.findall(r"^\| `python launch/(.*?)` \|", page, re.MULTILINE)]
    assert [script for script, *_ in commands] == ["train.py"] * 3 + ["report.py", "export.py"]
    for script, *words in commands:
        if script != "train.py":
            run_command(script.removesuffix(".py"), *words)
            continue
        short = ["train.epochs=1", "schedule.warmup_epochs=0", "device=cpu"]
        done = subprocess.run(
            [sys.executable, str(ROOT / "launch/train.py"), *words, *short], capture_output=True, text=True, check=False
        )
        assert done.returncode == 0, done.stderr
    assert "Gain over independent" in (tmp_path / "flowers.html").read_text("utf-8")
    assert len(list((tmp_path / "runs/flowers").rglob("*.safetensors"))) == 2


def test_a_network_and_a_method_of_ones_own_train_by_the_pages(tmp_path: Path) -> None:
    for room in ("losses", "models"):
        shutil.copytree(ROOT / room, tmp_path / room, ignore=shutil.ignore_patterns("__pycache__"))
    (network,) = blocks("your_own_network.md", "python")
    (tmp_path / "models/my_net.py").write_text(network)
    (method,) = blocks("your_own_method.md", "python")
    (tmp_path / "losses/agree.py").write_text(method)
    listed = (tmp_path / "losses/__init__.py").read_text("utf-8")
    assert listed.count("(Independent, ") == 1
    listed = "from losses.agree import Agree\n" + listed.replace("(Independent, ", "(Independent, Agree, ")
    (tmp_path / "losses/__init__.py").write_text(listed)
    (run,) = (yaml.safe_load(block) for block in blocks("your_own_method.md", "yaml"))
    config = run | {
        "dir": str(tmp_path / "run"),
        "peers": [{"network": "my_net_4", "copies": 3}],
        "data": run["data"] | {"fraction": 0.01},
        "method": run["method"] | {"ramp": 1},
        "train": {"epochs": 2},
    }
    (tmp_path / "agree.yaml").write_text(yaml.safe_dump(config))
    done = subprocess.run(
        [sys.executable, str(ROOT / "launch/train.py"), str(tmp_path / "agree.yaml")],
        env={**os.environ, "PYTHONPATH": f"{tmp_path}:{ROOT}", "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=240,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    lines = [json.loads(line) for line in (tmp_path / "run/metrics.jsonl").read_text().splitlines()]
    squares = [[line[key] for key in line if key.endswith("/squares")] for line in lines if "lr" in line]
    # The ramp begins at 0, and peers of different weights never have the same logits.
    assert [len(terms) for terms in squares] == [3, 3]
    assert squares[0] == [0.0] * 3
    assert min(squares[1]) > 0

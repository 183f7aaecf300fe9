"""launch/plan.py: a table and a choice, without a GPU."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml

from engine.config.loading import load
from engine.ranks.planning.choosing import plan
from tests.launch.command import run_command
from tests.marks import slow

CONFIG = """\
name: planned
method: {{name: {method}}}
peers:
  - {{network: cifar_wrn_16_4, name: large}}
  - {{network: cifar_resnet8_b, name: small}}
data: {{dataset: fashion_mnist_subset, global_batch: 4096}}
train: {{epochs: 2}}
precision: {{amp: bf16}}
"""


TINY = ("data.global_batch=16", "device=cpu", "precision.amp=float32", "peers.0.network=cifar_resnet8_a")


@pytest.fixture
def config(tmp_path: Path) -> Path:
    (tmp_path / "planned.yaml").write_text(CONFIG.format(method="dml"))
    return tmp_path / "planned.yaml"


def test_a_table_a_choice_and_why(config: Path) -> None:
    code, out, err = run_command("plan", str(config), "--gpus", "16", "--per-node", "8", "--gpu", "a100")
    assert (code, err) == (0, "")
    title, _, header, *rest = out.splitlines()
    assert title == ("planned: dml of large, small; 4,096 rows a step on 16 x a100, 2 nodes of 8; 4 steps")
    assert header.split()[:4] == ["placement", "memory", "step", "compute"]
    table = rest[: rest.index("")]
    assert [line[2:].split()[0] for line in table[:2]] == ["spread", "colocated"]
    assert sum(line.startswith("* ") for line in table) == 1
    chosen = next(line for line in table if line.startswith("* "))[2:].partition("  ")[0]
    assert rest[len(table) + 1].startswith(f"{chosen}: ")
    assert any(line.startswith("batch: up to ") for line in rest)
    assert any(line.startswith("large alone on all GPUs: ") for line in rest)


def test_yaml_gives_the_placement_that_was_chosen(config: Path, tmp_path: Path) -> None:
    code, out, _ = run_command("plan", str(config), "--gpus", "8", "--yaml")
    assert code == 0
    placement = yaml.safe_load(out)
    (tmp_path / "pasted.yaml").write_text(yaml.safe_dump({"base": "planned.yaml", **placement}))
    assert plan(load(tmp_path / "pasted.yaml"), 8, 0).world == 8


@pytest.mark.parametrize("kind", [slow("auto"), "spread"])
def test_peers_can_be_timed_here(config: Path, kind: str) -> None:
    """Whatever ranks the run is for: they are timed on one."""
    code, out, _ = run_command("plan", str(config), "--gpus", "2", "--measure", *TINY, f"placement.kind={kind}")
    assert code == 0
    assert "images/s" in out


def test_one_peer_is_told_what_a_second_costs(tmp_path: Path) -> None:
    text = CONFIG.format(method="independent").replace("  - {network: cifar_wrn_16_4, name: large}\n", "")
    (tmp_path / "one.yaml").write_text(text)
    code, out, _ = run_command("plan", str(tmp_path / "one.yaml"), "--gpus", "4")
    assert code == 0
    assert "a second peer like it: " in out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--gpus", "0"], "--gpus 0: expected a number from 1"),
        (["--gpus", "12"], "--gpus 12: expected whole nodes of 8; nearest: 8 or 16"),
        (
            ["--gpus", "8", "--gpu", "h10"],
            "--gpu h10: not in the table; expected one of v100, a100-40gb, a100, l40s, rtx4090, h100, h200, b200; did "
            "you mean 'h100'?",
        ),
        (
            ["--gpus", "16384"],
            "data.global_batch = 4096: too few rows for 16384 GPUs and 2 peers; expected at least 8192, or fewer GPUs",
        ),
        (["--gpus", "8", "train.epoch=3"], "train.epoch = 3: unknown key; did you mean 'epochs'?"),
    ],
)
def test_what_cannot_be_planned_is_said(config: Path, arguments: list[str], message: str) -> None:
    code, out, err = run_command("plan", str(config), *arguments, check=False)
    assert (code, out) == (2, "")
    assert err.startswith(f"error: {message}")

"""What commands import before they have something to do with it: torch alone takes two seconds, and its compiler, which
timm brings along, as much again. Counted, not timed."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch

from tests.marks import slow

ROOT = Path(__file__).parents[2]
COMMANDS = sorted(
    str(path.relative_to(ROOT))
    for path in (*(ROOT / "launch").glob("*.py"), *(ROOT / "launch").glob("*/__main__.py"))
    if "__main__" in path.read_text(encoding="utf-8") and path.name != "with_parent.py"
)
SLOW = (
    "torch",
    "torch._dynamo",
    "torch._inductor",
    "sympy",
    "triton",
    "numpy",
    "pydantic",
    "timm",
    "torchvision",
    "wandb",
    "matplotlib",
    "PIL",
    "nvidia.dali",
)
OLD = {"sympy"} if tuple(map(int, torch.__version__.split(".")[:2])) < (2, 14) else set()
"""What a rehearsal asks of torch as it was."""
TOLD = f"""
import atexit, runpy, sys
atexit.register(lambda: print("imported:", *({{*{SLOW}}} & {{*sys.modules}})))
sys.argv = sys.argv[1:]
runpy.run_path(sys.argv[0], run_name="__main__")
"""


def start(*words: str) -> tuple[str, set[str]]:
    """What a command prints, and which of the slow packages it has imported at its end."""
    done = subprocess.run([sys.executable, "-c", TOLD, *words], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    said, _, imported = done.stdout.rpartition("imported:")
    return said, {*imported.split()}


@pytest.mark.slow
def test_starts_are_timed_against_importing_torch() -> None:
    said, _ = start("launch/bench/__main__.py", "start", "--rounds", "2")
    for what in ("--help", "--check", "the first step", "import torch"):
        assert f"  {what:16} " in said
    assert said.count("/ import torch: ") == 4


@pytest.mark.parametrize("command", COMMANDS)
def test_help_is_printed_without_torch(command: str) -> None:
    said, imported = start(command, "--help")
    assert said.startswith("usage: ")
    assert imported == set()


def test_nothing_is_let_go_of_while_torch_is_imported() -> None:
    code = """
import gc, sys, launch.with_parent as at_start
with at_start.importing():
    print(gc.isenabled())
kept = gc.get_freeze_count()
print(gc.isenabled(), kept > 1000)
sys.modules["torch"] = sys
with at_start.importing():
    print(gc.isenabled())
print(gc.isenabled(), gc.get_freeze_count() == kept)
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["False", "True", "True", "True", "True", "True"]


def test_help_mentions_all_options_and_exit_codes() -> None:
    said, _ = start("launch/train.py", "--help")
    for word in ("--print-config", "--check", "--keys", "--fresh", "CONFIG", "section.key=value", "Exit codes: 0"):
        assert word in said, word


def test_a_run_of_our_networks_waits_for_no_other_library(tmp_path: Path) -> None:
    """Nor for torch's compiler; of matplotlib, which draws the curves at its end, it has need then."""
    config = "configs/fashion_mnist/quickstart_dml.yaml"
    words = ("train.epochs=null", "train.max_steps=1", "peers.0.options.width=4", f"dir={tmp_path / 'run'}")
    _, imported = start("launch/train.py", config, *words)
    assert imported == {"torch", "numpy", "pydantic", "PIL", "matplotlib"}
    _, imported = start("launch/train.py", config, *words, "--check", "--fresh")
    assert imported - OLD == {"torch", "numpy", "pydantic", "PIL"}, "a rehearsal needs no compiler"


@pytest.mark.parametrize(
    "words",
    [
        slow(("method={name: lmcl, width: 8}", "optimizer.name=adamw", "train.clip_norm=1.0")),
        ("placement.kind=auto", "peers=[{network: cifar_resnet8_b}, {network: cifar_resnet14_b}]", "--ranks", "4"),
    ],
)
def test_what_a_run_will_do_is_told_without_the_compiler(words: Sequence[str], tmp_path: Path) -> None:
    """Nor sympy, whatever the method looks at and however peers are placed."""
    config = "configs/fashion_mnist/quickstart_dml.yaml"
    said, imported = start("launch/train.py", config, *words, f"dir={tmp_path / 'run'}", "--check")
    assert "at the peak of a step" in said
    assert imported - OLD <= {"torch", "numpy", "pydantic", "PIL", "triton"}
    assert ("triton" in imported) == ("placement.kind=auto" in words), "only whoever counts operations has need of it"

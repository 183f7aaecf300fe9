"""What the pages say to type and to write: options that commands have, keys that configs have, files that are there."""

from __future__ import annotations

import functools
import re
import shlex
from pathlib import Path

import pytest

from engine.config.loading import describe, load
from tests.launch.command import run_command

ROOT = Path(__file__).parents[2]
PAGES = sorted([ROOT / "README.md", ROOT / "CONTRIBUTING.md", *ROOT.glob("docs/**/*.md"), *ROOT.glob("slurm/*.md")])
COMMAND = re.compile(r"(?<!tests/)launch/(\w+)\.py((?:(?!launch/)[^`\n|#;&>\\])*)")
KEY = re.compile(
    r"(?:data|train|optimizer|schedule|precision|placement|evaluation|checkpoint|log|health|report|method)"
    r"\.[a-z_]+(?:\.[a-z_]+)*"
)
FILES = (".py", ".md", ".html", ".csv", ".txt", ".png", ".yaml", ".json", ".jsonl", ".npz", ".sbatch")
MADE = {"losses/agree.py", "models/my_net.py"}
"""Files that a page has its reader write."""
pages = pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))


@functools.cache
def options_of(script: str) -> frozenset[str]:
    """The options that a command's help names."""
    return frozenset(re.findall(r"--[a-z][\w-]*", run_command(script, "--help")[1]))


@functools.cache
def keys() -> frozenset[str]:
    """All keys of configs, and what they lie under."""
    names = [line.partition(" = ")[0] for line in describe().splitlines() if line[:1].strip()]
    parts = [name.split(".") for name in names]
    return frozenset(".".join(part[:n]) for part in parts for n in range(1, len(part) + 1))


@pages
def test_commands_of_a_page_can_be_typed(page: Path) -> None:
    for script, rest in COMMAND.findall(page.read_text("utf-8")):
        assert (ROOT / "launch" / f"{script}.py").exists(), script
        if script == "ranks" or "$" in rest:  # torchrun's options; a shell's
            continue
        words = shlex.split(rest.partition(" --slurm")[0])
        for word in words:
            name, equals, _ = word.partition("=")
            known = name in options_of(script) or (equals and name.removeprefix("--") in keys())
            assert known or not word.startswith("--"), f"{script}: {word}"
        if script in ("train", "plan", "doctor", "evaluate"):
            plain = [word for word in words if not word.startswith("-")]
            subject = next(
                (word for word in plain if word.startswith("configs/")), "configs/imagenet/dml_resnet50.yaml"
            )
            load(ROOT / subject, [word for word in plain if "=" in word and not word.endswith("...")])


@pages
def test_keys_of_a_page_are_keys(page: Path) -> None:
    quoted = re.findall(r"`([^`\n]+)`", page.read_text("utf-8"))
    named = {key for text in quoted for key in KEY.findall(text) if not re.search(rf"[\w/.]{re.escape(key)}", text)}
    assert {key for key in named if not key.endswith(FILES)} <= keys()


@pages
def test_files_that_a_page_names_are_there(page: Path) -> None:
    text = page.read_text("utf-8")
    linked = [name for name in re.findall(r"\]\(([^)#]+)(?:#[^)]*)?\)", text) if "://" not in name]
    assert [name for name in linked if not (page.parent / name).exists()] == []
    named = re.findall(
        r"(?<![\w/])(?:configs|docs|tests|engine|losses|models|data_pipelines)/[\w/.]+\.(?:yaml|md|py)", text
    )
    assert [name for name in named if name not in MADE and not (ROOT / name).exists()] == []

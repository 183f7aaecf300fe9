"""What holds for the repository as a whole."""

from __future__ import annotations

import ast
import functools
from pathlib import Path

import pytest

from engine.config.loading import load

ROOT = Path(__file__).parent.parent
CONFIGS = sorted(
    path for path in ROOT.glob("configs/*/*.yaml") if not path.stem.endswith("base") and path.stem != "quickstart"
)


@functools.cache
def names() -> list[str]:
    return [load(path).name for path in CONFIGS]


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: f"{path.parent.name}/{path.stem}")
def test_every_config_is_valid_and_its_name_is_its_own(path: Path) -> None:
    assert names().count(load(path).name) == 1


@pytest.mark.parametrize("room", ["losses", "models", "data_pipelines"])
def test_the_bottom_row_knows_nothing_of_ranks(room: str) -> None:
    for path in (ROOT / room).rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import | ast.ImportFrom) else []
            names += [node.module or ""] if isinstance(node, ast.ImportFrom) else []
            assert not any(name.startswith("torch.distributed") or name == "distributed" for name in names), path


def test_nothing_on_disk_is_unpickled_or_executed() -> None:
    for path in (
        p for room in ("launch", "engine", "losses", "models", "data_pipelines") for p in (ROOT / room).rglob("*.py")
    ):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute):
                called, keywords = ast.unparse(node.func), {k.arg: ast.unparse(k.value) for k in node.keywords}
                assert called not in (
                    "pickle.load",
                    "pickle.loads",
                    "yaml.load",
                    "yaml.unsafe_load",
                    "yaml.full_load",
                ), path
                assert called != "torch.load" or keywords.get("weights_only") == "True", path
                assert called not in ("np.load", "numpy.load") or keywords.get("allow_pickle") == "False", path

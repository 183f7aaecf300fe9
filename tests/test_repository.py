"""What holds for the repository as a whole."""

from __future__ import annotations

import ast
import functools
from pathlib import Path

import pytest

from engine.config.loading import load

ROOT = Path(__file__).parent.parent
CONFIGS = sorted(
    path
    for path in ROOT.glob("configs/*/*.yaml")
    # What other files inherit from, and sweeps, which are tested as such.
    if not path.stem.endswith("base") and path.stem != "quickstart" and path.parent.name != "tables"
)


@functools.cache
def parsed(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"))


NAMES: dict[str, Path] = {}


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: f"{path.parent.name}/{path.stem}")
def test_every_config_is_valid_and_its_name_is_its_own(path: Path) -> None:
    assert NAMES.setdefault(load(path).name, path) == path


@pytest.mark.parametrize("room", ["losses", "models", "data_pipelines"])
def test_the_bottom_row_knows_nothing_of_ranks(room: str) -> None:
    for path in (ROOT / room).rglob("*.py"):
        for node in ast.walk(parsed(path)):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import | ast.ImportFrom) else []
            names += [node.module or ""] if isinstance(node, ast.ImportFrom) else []
            assert not any(name.startswith("torch.distributed") or name == "distributed" for name in names), path


def test_nothing_on_disk_is_unpickled_or_executed() -> None:
    for path in (
        p for room in ("launch", "engine", "losses", "models", "data_pipelines") for p in (ROOT / room).rglob("*.py")
    ):
        for node in ast.walk(parsed(path)):
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


ROOMS = ("data_pipelines", "engine", "launch", "losses", "models")
OURS = sorted(path for room in (*ROOMS, "tests") for path in (ROOT / room).rglob("*.py"))


def test_no_file_is_longer_than_400_lines_and_no_class_than_200() -> None:
    long = {str(path.relative_to(ROOT)): len(path.read_text(encoding="utf-8").splitlines()) for path in OURS}
    classes = {
        f"{path.relative_to(ROOT)}: {node.name}": (node.end_lineno or 0) - node.lineno + 1
        for path in OURS
        for node in ast.walk(parsed(path))
        if isinstance(node, ast.ClassDef)
    }
    assert {name: lines for name, lines in long.items() if lines > 400} == {}
    assert {name: lines for name, lines in classes.items() if lines > 201} == {}


def _module(path: Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def _imports(path: Path, known: set[str]) -> set[str]:
    """The modules of ours that a file names, at its top or inside a function."""
    named: set[str] = set()
    for node in ast.walk(parsed(path)):
        if isinstance(node, ast.Import):
            named |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            inner = {f"{node.module}.{alias.name}" for alias in node.names}
            # `from engine.safety import loading` is of the module, not of the package.
            named |= (inner & known) or {node.module}
            named |= {node.module} if inner - known else set()
    return named & known - {_module(path)}


def test_there_is_no_circle_of_imports() -> None:
    graph = {_module(path): path for path in OURS if path.parts[len(ROOT.parts)] != "tests"}
    left = {module: _imports(path, set(graph)) for module, path in graph.items()}
    # What imports nothing that is left can be imported; what never can be stands in a circle, or above one.
    while ready := [module for module, needs in left.items() if not needs & left.keys()]:
        for module in ready:
            del left[module]
    assert left == {}

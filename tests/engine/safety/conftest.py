"""What the tests of checkpoints start from."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from engine.safety import checkpoint
from tests.checkpoints import a_run
from tests.runs import train_here


@pytest.fixture(scope="module")
def whole(tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that came to its end."""
    folder = tmp_path_factory.mktemp("whole") / "run"
    train_here(a_run(tiny, folder))
    assert checkpoint.steps_on_disk(folder)[-2:] == [9, 10]
    return folder


@pytest.fixture
def run(whole: Path, tmp_path: Path) -> Path:
    """A copy of it to damage."""
    return Path(shutil.copytree(whole, tmp_path / "run"))

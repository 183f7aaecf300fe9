"""Data that several modules read."""

from pathlib import Path

import pytest

from tests.data_pipelines.files import write_photos


@pytest.fixture(scope="session")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An ImageNet-style folder: 3 classes, 27 training and 15 validation photos."""
    root = tmp_path_factory.mktemp("photos")
    write_photos(root)
    return root

"""A data set that is opened is not looked at again for what was seen while it was checked."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]
COUNTED = """
import sys
from pathlib import Path
import torch
from data_pipelines import DataConfig, check_files, open_pipeline

seen = []
sys.addaudithook(lambda event, given: seen.append(str(given[0])) if event in ("open", "os.scandir") and given else None)

def times(word, ask):
    seen.clear()
    ask()
    return sum(word in path for path in seen)

sets = {
    "train-images": DataConfig(dataset="fashion_mnist_subset", fraction=0.1, global_batch=4),
    "train": DataConfig(dataset="image_folder", root=sys.argv[1], global_batch=4, decoding={"decoder": "torchvision"}),
}
for word, config in sets.items():
    print(times(word, lambda: check_files(config)), times(word, lambda: open_pipeline(config, 0, torch.device("cpu"))))
"""


def test_files_and_folders_are_read_as_often_to_open_as_to_check(photos: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-c", COUNTED, str(photos)], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert len(done.stdout.splitlines()) == 2
    for line in done.stdout.splitlines():
        checked, opened = map(int, line.split())
        assert opened <= checked

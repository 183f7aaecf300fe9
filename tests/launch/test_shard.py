"""launch/shard.py: packs, is trained on, and says what is wrong."""

import json
from pathlib import Path

import pytest

from engine.config.loading import load
from tests.data_pipelines.files import write_photos
from tests.launch.command import run_command
from tests.runs import train_here
from tests.worlds import run_ranks

CONFIG = """
name: packed
dir: {at}/run
method: {{name: independent}}
peers: [{{network: cifar_resnet8_b, options: {{width: 4}}}}]
data: {{dataset: webdataset, root: {at}/shards, global_batch: 8, image: {{size: 32, resize: 36}}}}
train: {{epochs: 1}}
"""


def test_a_folder_is_packed_and_can_be_trained_on(tmp_path: Path) -> None:
    write_photos(tmp_path / "photos")
    (tmp_path / "photos/train/n000/07.JPEG").write_bytes(b"")
    where = [str(tmp_path / "photos"), str(tmp_path / "shards")]
    code, out, _ = run_command("shard", *where, "--per-shard=5", "--verify", "--shorter-side=64", check=False)
    assert code == 1
    assert out.splitlines() == [
        f"{tmp_path}/photos/train/n000/07.JPEG: expected an image, found an empty file",
        f"{tmp_path}/shards: 41 photos packed, 1 that cannot be read left out",
    ]
    assert (tmp_path / "shards/classes.txt").read_text() == "n000\nn001\nn002\n"
    (tmp_path / "run.yaml").write_text(CONFIG.format(at=tmp_path))
    run_ranks(2, train_here, load(tmp_path / "run.yaml"))
    lines = [json.loads(line) for line in (tmp_path / "run/metrics.jsonl").read_text().splitlines()]
    assert lines[-1]["step"] == 3  # 26 images in batches of 8
    assert not (tmp_path / "run/damaged.json").exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["{at}", "{at}/out"], "{at}: expected a folder train or val with a folder for each class, found neither"),
        (["{at}", "{at}/out", "--quality=101"], "--quality 101: expected 1 to 100"),
    ],
)
def test_mistakes(tmp_path: Path, arguments: list[str], message: str) -> None:
    code, _, err = run_command("shard", *(argument.format(at=tmp_path) for argument in arguments), check=False)
    assert code == 2
    assert message.format(at=tmp_path) in err

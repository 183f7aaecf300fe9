"""launch/doctor.py names the files that a run would stumble over."""

from __future__ import annotations

import json
from pathlib import Path

from tests.data_pipelines.files import write_photos
from tests.data_pipelines.test_bad_files import _half, _undecodable
from tests.launch.command import run_command

CONFIG = """\
name: looked-at
device: cpu
method: {{name: independent}}
peers: [{{network: timm/test_resnet}}]
data: {{dataset: image_folder, root: {root}, global_batch: 8}}
train: {{epochs: 1}}
"""


def test_every_file_is_looked_at(tmp_path: Path) -> None:
    root, config = tmp_path / "photos", tmp_path / "run.yaml"
    write_photos(root)
    config.write_text(CONFIG.format(root=root))
    _, out, _ = run_command("doctor", str(config), "--threads", "2")
    assert out == "42 files, 0 that cannot be read: 0 of train, 0 of val\n"

    _half(root / "train/n001/02.JPEG")
    _undecodable(root / "val/n000/00.JPEG")
    (root / "val/n002/01.JPEG").write_bytes(b"")
    code, out, _ = run_command("doctor", str(config), "--json", str(tmp_path / "found.json"), check=False)
    assert code == 1
    assert out.endswith("42 files, 3 that cannot be read: 1 of train, 2 of val\n")
    assert f"{root}/val/n002/01.JPEG: expected an image, found an empty file\n" in out
    found = json.loads((tmp_path / "found.json").read_text())
    assert [Path(entry["path"]).name for entry in found] == ["02.JPEG", "00.JPEG", "01.JPEG"]
    assert [entry["split"] for entry in found] == ["train", "val", "val"]


def test_what_has_no_files_of_its_own(tmp_path: Path) -> None:
    config = tmp_path / "run.yaml"
    config.write_text(CONFIG.format(root=tmp_path).replace(f"image_folder, root: {tmp_path}", "fashion_mnist_subset"))
    code, _, err = run_command("doctor", str(config), check=False)
    assert code == 2
    assert "data.dataset = fashion_mnist_subset: is read and checked as a whole at each start" in err

"""launch/doctor.py names the files that a run would stumble over."""

from __future__ import annotations

import json
import re
from pathlib import Path

import torch

from engine.config.loading import load
from launch.examining.exchange import exchange
from launch.examining.rates import Rates, limits
from tests.data_pipelines.files import write_photos
from tests.data_pipelines.test_bad_files import _half, _undecodable
from tests.launch.command import run_command
from tests.worlds import run_world

ROOT = Path(__file__).parents[2]
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
    _, out, _ = run_command("doctor", str(config), "--files", "--threads", "2")
    assert out == "42 files, 0 that cannot be read: 0 of train, 0 of val\n"

    _half(root / "train/n001/02.JPEG")
    _undecodable(root / "val/n000/00.JPEG")
    (root / "val/n002/01.JPEG").write_bytes(b"")
    code, out, _ = run_command("doctor", str(config), "--files", "--json", str(tmp_path / "found.json"), check=False)
    assert code == 1
    assert out.endswith("42 files, 3 that cannot be read: 1 of train, 2 of val\n")
    assert f"{root}/val/n002/01.JPEG: expected an image, found an empty file\n" in out
    found = json.loads((tmp_path / "found.json").read_text())
    assert [Path(entry["path"]).name for entry in found] == ["02.JPEG", "00.JPEG", "01.JPEG"]
    assert [entry["split"] for entry in found] == ["train", "val", "val"]


def test_what_has_no_files_of_its_own(tmp_path: Path) -> None:
    config = tmp_path / "run.yaml"
    config.write_text(CONFIG.format(root=tmp_path).replace(f"image_folder, root: {tmp_path}", "fashion_mnist_subset"))
    code, _, err = run_command("doctor", str(config), "--files", check=False)
    assert code == 2
    assert "data.dataset = fashion_mnist_subset: is read and checked as a whole at each start" in err


def test_what_a_run_would_wait_for(tmp_path: Path) -> None:
    root, config = tmp_path / "photos", tmp_path / "run.yaml"
    write_photos(root)
    config.write_text(CONFIG.format(root=root))
    _, out, _ = run_command("doctor", str(config), "data.image.size=32", f"dir={tmp_path}")
    assert "\nexchange: gloo starts; one rank has nobody to talk to" in out
    for line in ("cores: ", "memory: ", "torch ", "decoder: ", "storage: ", "decoding alone: ", "training: "):
        assert f"\n{line}" in f"\n{out}", line
    assert "decoding keeps up: " in out or "decoding limits this run: " in out


def lines_about_the_exchange() -> list[str]:
    return list(exchange(torch.device("cpu")))


def test_ranks_are_heard_to_talk() -> None:
    found = run_world(2, lines_about_the_exchange)
    for [line] in found:
        assert re.fullmatch(
            r"exchange between 2 ranks, gloo: \d+\.\d\d GB/s of a rank in all-reduces of 67 MB, [\d,]+ us for a single "
            "number",
            line,
        )
    assert found[0] == found[1]


def test_advice_follows_from_rates() -> None:
    config = load(ROOT / "configs/imagenet/dml_resnet50.yaml", ["data.root=/nowhere"])
    # Two ranks want 200 images/s; decoding 50 of them leaves three quarters of the time.
    slow = "\n".join(limits(Rates(read=150, decoded=50, trained=100), config, 2))
    assert "it would wait 75 % of the time" in slow
    assert "the storage limits this run: 150 photos/s, where 200 are wanted" in slow
    fast = "\n".join(limits(Rates(read=300, decoded=500, trained=100), config, 2))
    assert "decoding keeps up: 2.5 times what 2 ranks" in fast
    assert "the storage keeps up: 1.5 times" in fast

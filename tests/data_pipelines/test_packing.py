"""Packing class folders into shards: the same photos, resumed and parallel packings alike, smaller ones, bad ones."""

import io
import json
import os
import shutil
import tarfile
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from data_pipelines import DataError, order
from data_pipelines.preparing.packing import Packing, pack
from data_pipelines.sources.folders.class_folders import list_split
from data_pipelines.sources.shards.tar_shards import TarShards, shards_of


def _pack(photos: Path, to: Path, how: Packing, threads: int = 2) -> list[str]:
    """Packs the training photos; gives the places of those that are left out."""
    done: list[int] = []
    left = pack(list_split(photos / "train", photos), "train", to, how, threads, done.append)
    assert sum(done) == len(list((photos / "train").rglob("*.*")))
    return [damaged.path for damaged in left]


def _read(to: Path) -> TarShards:
    return TarShards(shards_of(to, "train", alone=False, links="inside"), to, cache=None, split="train")


def test_what_is_packed_is_what_is_read_and_any_number_of_threads_writes_the_same(photos: Path, tmp_path: Path) -> None:
    folder = list_split(photos / "train", photos)
    for threads in (1, 3):
        assert _pack(photos, tmp_path / str(threads), Packing(per_shard=4, verify=True), threads) == []
    packed = _read(tmp_path / "1")
    assert packed.labels.tolist() == folder.labels.tolist()
    assert [packed.read(k) for k in range(27)] == [folder.read(k) for k in range(27)]
    for path in (tmp_path / "1/train").iterdir():
        assert path.read_bytes() == (tmp_path / "3/train" / path.name).read_bytes()
    with tarfile.open(tmp_path / "1/train/train-000003.tar") as tar:
        names = tar.getnames()
        assert names[:3] == ["00000012.png", "00000012.cls", "00000012.json"]
        about = json.loads(tar.extractfile("00000012.json").read())  # type: ignore[union-attr]
    assert about == {"label": 1, "class": "n001", "from": folder.place(12)}


def test_a_packing_that_was_stopped_goes_on_and_no_other_is_mixed_with_it(photos: Path, tmp_path: Path) -> None:
    _pack(photos, tmp_path / "whole", Packing(per_shard=4))
    shutil.copytree(tmp_path / "whole", tmp_path / "stopped")
    kept, lost = (tmp_path / f"stopped/train/train-00000{k}.tar" for k in (1, 2))
    os.utime(kept, (1e9, 1e9))
    lost.unlink()
    _pack(photos, tmp_path / "stopped", Packing(per_shard=4))
    assert kept.stat().st_mtime == 1e9
    assert lost.read_bytes() == (tmp_path / "whole/train/train-000002.tar").read_bytes()
    with pytest.raises(DataError, match=r"stopped/train: was begun with another quality: expected an empty folder"):
        _pack(photos, tmp_path / "stopped", Packing(per_shard=4, quality=90))
    (tmp_path / "other/train").mkdir(parents=True)
    (tmp_path / "other/train/x").touch()
    with pytest.raises(DataError, match="other/train: expected an empty folder, or one that this command has begun"):
        _pack(photos, tmp_path / "other", Packing())


def test_a_shuffled_order_is_that_of_an_epoch(photos: Path, tmp_path: Path) -> None:
    _pack(photos, tmp_path, Packing(per_shard=10, shuffled=True, seed=3))
    folder, packed = list_split(photos / "train", photos), _read(tmp_path)
    shuffled = order.epoch_order(3, 0, 27).tolist()
    assert [packed.read(place) for place in range(27)] == [folder.read(index) for index in shuffled]


def test_smaller_photos(photos: Path, tmp_path: Path) -> None:
    _pack(photos, tmp_path, Packing(shorter_side=96, quality=80))
    folder, packed = list_split(photos / "train", photos), _read(tmp_path)
    for index in range(27):
        with Image.open(io.BytesIO(folder.read(index))) as before, Image.open(io.BytesIO(packed.read(index))) as after:
            if min(before.size) <= 96:
                assert packed.read(index) == folder.read(index)
                continue
            assert (min(after.size), after.format, after.mode) == (96, "JPEG", "RGB")
            assert max(after.size) == 96 * max(before.size) // min(before.size)
            wanted = np.asarray(before.convert("RGB").resize(after.size, Image.Resampling.BICUBIC)).astype(int)
            if before.mode != "CMYK":
                assert np.abs(np.asarray(after).astype(int) - wanted).mean() < 6


def test_photos_that_cannot_be_read_are_left_out_and_named_again(photos: Path, tmp_path: Path) -> None:
    copied = Path(shutil.copytree(photos, tmp_path / "photos"))
    empty, damaged = copied / "train/n000/00.JPEG", copied / "train/n002/01.JPEG"
    empty.write_bytes(b"")
    damaged.write_bytes(b"\xff\xd8 no photo \xff\xda\xff\xd9")
    places = [str(empty), str(damaged)]
    for _ in range(2):  # and once more, from what is written
        assert _pack(copied, tmp_path / "out", Packing(per_shard=4, verify=True)) == places
    assert len(_read(tmp_path / "out")) == 25

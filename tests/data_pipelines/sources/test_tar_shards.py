"""Tar shards: the same samples as in folders, read at their offsets; an index that is kept; damaged shards."""

import os
from pathlib import Path

import pytest

from data_pipelines import DataError
from data_pipelines.damage import UnreadableError
from data_pipelines.sources.contract import Source
from data_pipelines.sources.opening import open_photos, open_validation_alone
from data_pipelines.sources.sections import Where
from data_pipelines.sources.shards import indexing
from tests.data_pipelines.forms import bytes_of, samples_of, write_shards, write_tar


def _open(root: Path, **options: object) -> tuple[Source, Source]:
    open_photos.cache_clear()
    return open_photos(Where("webdataset", root, **options))  # type: ignore[arg-type]


@pytest.mark.parametrize("pattern", ["{split}/{split}-{number:06d}.tar", "imagenet1k-{split}-{number}.tar"])
def test_shards_hold_what_the_folders_hold(photos: Path, tmp_path: Path, pattern: str) -> None:
    write_shards(photos, tmp_path, per_shard=2, pattern=pattern)  # 14 shards: 9 comes before 10
    for source, split in zip(_open(tmp_path), ("train", "val"), strict=True):
        wanted = samples_of(photos, split)
        assert source.labels.tolist() == [label for _, label, _ in wanted]
        assert [source.read(index) for index in range(len(source))] == bytes_of(wanted)
        assert source.remarks == ()


def test_classes_are_named_by_synset_where_the_images_are(tmp_path: Path) -> None:
    for split in ("train", "val"):
        members = {
            "n01440764_18.JPEG": b"x",
            "n01440764_18.cls": b"0",
            "n01484850_3.jpg": b"yy",
            "n01484850_3.cls": b"2",
        }
        write_tar(tmp_path / split / "0.tar", members)
    train, val = _open(tmp_path)
    assert train.classes == val.classes == ("n01440764", "1", "n01484850")
    assert train.labels.tolist() == [0, 2]
    assert train.place(1) == f"{tmp_path}/train/0.tar!n01484850_3.jpg"
    (tmp_path / "synsets").write_text("n01440764 tench\nn01443537 goldfish\nn01484850 great white shark\n")
    assert _open(tmp_path, classes=tmp_path / "synsets")[0].classes == ("n01440764", "n01443537", "n01484850")
    alone = open_validation_alone(Where("webdataset", tmp_path / "val"), train.classes)
    assert alone.labels.tolist() == [0, 2]


def test_classes_by_name_and_what_is_left_out(tmp_path: Path) -> None:
    for split in ("train", "val"):
        members = {
            "a/1.png": b"1", "a/1.json": b'{"label": "cow"}', "b/1.txt": b"no image", "b/1.cls": b"cat",
            "c.webp": b"22", "c.seg.png": b"mask", "c.cls": b"cat\n", "__index__.json": b"{}", ".hidden.jpg": b"",
        }  # fmt: skip
        write_tar(tmp_path / split / "0.tar", members)
    train, _ = _open(tmp_path)
    assert (train.classes, train.labels.tolist()) == (("cat", "cow"), [1, 0])
    assert [train.read(index) for index in range(2)] == [b"1", b"22"]
    assert train.remarks == (
        f"left out of 1 shards of {tmp_path}/train: 1 further images of a sample, 1 samples without an image",
    )


def test_ilsvrcs_own_tars(tmp_path: Path) -> None:
    """A tar of each class's tar, and one of validation images without labels."""
    for name in ("n02", "n01"):
        write_tar(tmp_path / f"classes/{name}.tar", {f"{name}_{k}.JPEG": f"{name}{k}".encode() for k in range(3)})
    whole = {path.name: path.read_bytes() for path in sorted((tmp_path / "classes").iterdir())}
    write_tar(tmp_path / "whole/ILSVRC2012_img_train.tar", whole)
    write_tar(tmp_path / "whole/ILSVRC2012_img_val.tar", {f"val_{k}.JPEG": b"v" for k in (2, 1)})
    (tmp_path / "labels").write_text("n02\nn01\n")
    for root in ("whole", "classes"):
        if root == "classes":
            os.rename(tmp_path / "classes", tmp_path / "train")
        train, val = _open(
            tmp_path / "whole" if root == "whole" else tmp_path,
            val_root=tmp_path / "whole",
            val_labels=tmp_path / "labels",
        )
        assert train.classes == ("n01", "n02")
        assert train.labels.tolist() == [0] * 3 + [1] * 3
        assert [train.read(index) for index in range(6)] == [
            f"{n}{k}".encode() for n in ("n01", "n02") for k in range(3)
        ]
        assert val.labels.tolist() == [0, 1]


def test_the_index_is_kept_and_made_anew_where_a_shard_changed(photos: Path, tmp_path: Path) -> None:
    write_shards(photos, tmp_path)
    before = _open(tmp_path)[0]
    kept = tmp_path / ".cohort"
    assert sorted(path.name for path in kept.iterdir()) == ["tar-train.npz", "tar-val.npz"]
    shard = tmp_path / "train/train-000001.tar"
    stat, content = shard.stat(), shard.read_bytes()
    shard.write_bytes(b"?" * len(content))
    os.utime(shard, ns=(stat.st_atime_ns, stat.st_mtime_ns))  # so that nobody can see it: what is kept is used
    assert _open(tmp_path)[0].digest() == before.digest()
    os.utime(shard)
    with pytest.raises(DataError, match=rf"^{shard}: expected a whole tar file, found one that is cut short"):
        _open(tmp_path)
    shard.write_bytes(content)
    (kept / "tar-train.npz").write_bytes(b"not an index")
    assert _open(tmp_path)[0].digest() == before.digest()


def test_a_look_that_was_stopped_goes_on(photos: Path, tmp_path: Path) -> None:
    write_shards(photos, tmp_path)
    shards = sorted((tmp_path / "train").iterdir())
    whole = shards[3].read_bytes()
    shards[3].write_bytes(whole[:700])
    with pytest.raises(DataError, match="cut short or damaged"):
        _open(tmp_path)
    parts = sorted(path.name for path in (tmp_path / ".cohort/tar-train.parts").iterdir())
    # How far the others were when one failed is a matter of threads; what was done is kept.
    assert parts
    assert set(parts) <= {f"{path.name}.npz" for path in shards if path != shards[3]}
    shards[3].write_bytes(whole)
    assert len(_open(tmp_path)[0]) == 27
    assert not (tmp_path / ".cohort/tar-train.parts").exists()


@pytest.mark.parametrize("cut", [100, 600, 5000, -11000])
def test_a_shard_that_is_cut_short_is_named(photos: Path, tmp_path: Path, cut: int) -> None:
    write_shards(photos, tmp_path, per_shard=9)
    shard = tmp_path / "train/train-000001.tar"
    shard.write_bytes(shard.read_bytes()[:cut])
    with pytest.raises(DataError, match=rf"^{shard}: expected a whole tar file"):
        indexing.index_shard(shard)


def test_mistakes(photos: Path, tmp_path: Path) -> None:
    for members, message in (
        ({"a.jpg": b"x", "b.jpg": b"x", "b.cls": b"1"}, r"0.tar!a.jpg: expected a .cls or .json beside it"),
        ({"a.txt": b"x"}, r"expected samples in 1 shards, found none"),
    ):
        write_tar(tmp_path / "train/0.tar", members)
        with pytest.raises(DataError, match=message):
            _open(tmp_path)
    write_tar(tmp_path / "train/0.tar", {"a.jpg": b"x", "a.cls": b"1"})
    with pytest.raises(DataError, match=r"expected shards with val in their names, found none among 0\. webdataset"):
        _open(tmp_path)
    write_tar(tmp_path / "val/0.tar", {"a.jpg": b"x", "a.cls": b"2"})
    with pytest.raises(DataError, match=r"val/0.tar!a.jpg: expected a class below 2, found 2"):
        _open(tmp_path)


def test_a_shard_that_is_cut_short_after_the_start(photos: Path, tmp_path: Path) -> None:
    write_shards(photos, tmp_path, per_shard=9)
    train, _ = _open(tmp_path)
    shard = tmp_path / "train/train-000001.tar"
    os.truncate(shard, 2000)
    with pytest.raises(UnreadableError, match=r"^expected \d+ bytes in the shard, found \d+: it was cut short since$"):
        train.read(12)
    assert train.read(0) == bytes_of(samples_of(photos, "train"))[0]


def test_more_shards_than_may_be_open_at_once(photos: Path, tmp_path: Path) -> None:
    import concurrent.futures

    from data_pipelines.sources.shards.tar_shards import _Descriptors

    write_shards(photos, tmp_path, per_shard=1)
    shards = sorted((tmp_path / "train").iterdir())
    files = _Descriptors(shards)
    files._most = 3
    with concurrent.futures.ThreadPoolExecutor(8) as pool:
        read = list(pool.map(lambda k: files.read(k % 27, 600, 0), range(400)))
    assert read == [shards[k % 27].read_bytes()[:600] for k in range(400)]
    assert len(files._open) <= 3 + 8

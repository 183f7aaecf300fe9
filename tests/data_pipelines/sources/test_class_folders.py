"""The listing of a folder of photos, and what is said of folders that are wrong."""

import os
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
from torchvision.datasets import ImageFolder

from data_pipelines import DataConfig, DataError, check_files
from data_pipelines.sources.folders.walking import EXTENSIONS
from data_pipelines.sources.opening import open_photos, open_validation_alone
from data_pipelines.sources.sections import Where

_GET = (
    " image_folder wants ROOT/train/<class>/*.JPEG and ROOT/val/<class>/*.JPEG; ImageNet (ILSVRC2012) comes from "
    "https://image-net.org/download-images"
)


def _write(root: Path) -> None:
    for split, names in (("train", ("b.JPEG", "a.jpg", "C.Png", "notes.txt", ".hidden.JPEG")), ("val", ("x.jpeg",))):
        for label in ("cat", "Dog"):
            folder = root / split / label
            folder.mkdir(parents=True)
            for name in names:
                (folder / name).touch()
        (root / split / ".cache").mkdir()
        (root / split / "readme.md").touch()


def test_listing(tmp_path: Path) -> None:
    _write(tmp_path)
    train, val = open_photos(Where("image_folder", tmp_path))
    assert train.classes == val.classes == ("Dog", "cat")
    assert list(train.names) == ["C.Png", "a.jpg", "b.JPEG"] * 2
    assert train.labels.tolist() == [0, 0, 0, 1, 1, 1]
    assert train.place(4) == f"{tmp_path}/train/cat/a.jpg"
    assert [val.place(index) for index in range(2)] == [f"{tmp_path}/val/{label}/x.jpeg" for label in ("Dog", "cat")]


def test_links_inside_the_root_are_followed(tmp_path: Path) -> None:
    root = tmp_path / "root"
    _write(root)
    (root / "train/cat").rename(root / "cats")
    (root / "train/cat").symlink_to("../cats")
    (root / "cats/d.JPEG").symlink_to("b.JPEG")
    (tmp_path / "link").symlink_to("root")
    train, _ = open_photos(Where("image_folder", tmp_path / "link"))
    assert train.names[3:] == ["C.Png", "a.jpg", "b.JPEG", "d.JPEG"]


def _link(where: str, target: str) -> Callable[[Path], object]:
    def breaks(root: Path) -> None:
        (root.parent / "secret").mkdir()
        (root.parent / "secret/key.JPEG").touch()
        (root / where).symlink_to(target)

    return breaks


def _empty(folder: Path) -> None:
    for path in folder.iterdir():
        path.unlink()


_ERRORS: list[tuple[Callable[[Path], object], str]] = [
    (lambda root: root.rename(root.parent / "away"), f"root: {{root}} is not a folder.{_GET}"),
    (lambda root: (root / "val").rename(root / "validation"), f"{{root}}/val: no such folder.{_GET}"),
    (
        lambda root: [path.rename(path.with_name("." + path.name)) for path in (root / "val").glob("[cD]*")],
        f"{{root}}/val: expected one folder for each class, found none.{_GET}",
    ),
    (
        lambda root: _empty(root / "train/cat"),
        f"{{root}}/train/cat: expected at least one image ({', '.join(EXTENSIONS)}), found none.{_GET}",
    ),
    (
        lambda root: (root / "val/cat").rename(root / "val/cow"),
        "{root}: expected the same classes in train and val, found 1 only in train ['cat'] and 1 only in val ['cow']."
        + _GET,
    ),
    (
        _link("train/cat/key.JPEG", "../../../secret/key.JPEG"),
        "{root}/train/cat/key.JPEG: expected a file or folder inside {root}, "
        "found a link to {root.parent}/secret/key.JPEG. Copy it, link inside, or allow it by data.links=anywhere",
    ),
    (
        _link("val/cow", "../../secret"),
        "{root}/val/cow: expected a file or folder inside {root}, found a link to {root.parent}/secret. "
        "Copy it, link inside, or allow it by data.links=anywhere",
    ),
    (
        _link("train/cat/gone.JPEG", "nowhere.JPEG"),
        "{root}/train/cat/gone.JPEG: expected a file or folder, found a link to {root}/train/cat/nowhere.JPEG, "
        "which does not exist.",
    ),
]


@pytest.mark.parametrize(("breaks", "message"), _ERRORS)
def test_errors(tmp_path: Path, breaks: Callable[[Path], object], message: str) -> None:
    root = tmp_path / "root"
    _write(root)
    breaks(root)
    with pytest.raises(DataError) as caught:
        open_photos(Where("image_folder", root))
    assert str(caught.value) == message.format(root=root)


def test_a_global_batch_larger_than_the_folder(tmp_path: Path) -> None:
    pytest.importorskip("nvidia.dali")
    _write(tmp_path)
    check_files(DataConfig(dataset="image_folder", root=tmp_path, global_batch=6))
    with pytest.raises(DataError) as caught:
        check_files(DataConfig(dataset="image_folder", root=tmp_path, global_batch=7))
    assert str(caught.value) == f"global_batch: expected at most the 6 training samples of {tmp_path}, found 7"


# --- what torchvision's ImageFolder takes, and what else there may be ---


def test_nested_folders_and_all_suffixes_are_torchvisions(tmp_path: Path) -> None:
    for name in ("cat/z.jpg", "cat/sub/deep/b.webp", "cat/sub/a.TIFF", "cat/sub.x/c.ppm", "Dog/0.pgm", "Dog/1.bmp"):
        for split in ("train", "val"):
            (tmp_path / split / name).parent.mkdir(parents=True, exist_ok=True)
            (tmp_path / split / name).touch()
    train, val = open_photos(Where("image_folder", tmp_path))
    expected = ImageFolder(str(tmp_path / "train")).samples
    assert [(train.place(index), label) for index, label in enumerate(train.labels.tolist())] == expected
    assert val.labels.tolist() == train.labels.tolist()


def test_what_is_left_out_is_counted(tmp_path: Path) -> None:
    _write(tmp_path)
    train, _ = open_photos(Where("image_folder", tmp_path))
    assert train.remarks == (
        f"left out of {tmp_path}/train: 1 files beside the class folders, 2 files that are no images by their names, "
        "3 hidden files and folders",
    )
    assert check_files(DataConfig(dataset="image_folder", root=tmp_path, global_batch=6)).remarks[0] == train.remarks[0]


def test_links_to_anywhere_by_consent_but_not_in_circles(tmp_path: Path) -> None:
    root = tmp_path / "root"
    _write(root)
    (root / "train/cat").rename(tmp_path / "cats")
    (root / "train/cat").symlink_to(tmp_path / "cats")
    train, _ = open_photos(Where("image_folder", root, links="anywhere"))
    assert list(train.names)[3:] == ["C.Png", "a.jpg", "b.JPEG"]
    (tmp_path / "cats/again").symlink_to(tmp_path / "cats")
    open_photos.cache_clear()
    with pytest.raises(DataError) as caught:
        open_photos(Where("image_folder", root, links="anywhere"))
    assert str(caught.value) == (
        f"{root}/train/cat/again: expected a folder, found a link to {tmp_path}/cats, in which it lies"
    )


def test_a_place_of_its_own_for_validation(tmp_path: Path) -> None:
    _write(tmp_path / "one")
    _write(tmp_path / "two")
    (tmp_path / "one/val").rename(tmp_path / "alone")
    for val_root, folder in ((tmp_path / "two", tmp_path / "two/val"), (tmp_path / "alone", tmp_path / "alone")):
        _, val = open_photos(Where("image_folder", tmp_path / "one", val_root=val_root))
        assert val.place(0) == f"{folder}/Dog/x.jpeg"
    alone = open_validation_alone(Where("image_folder", tmp_path / "nowhere", val_root=tmp_path / "two"), None)
    assert alone.place(0) == f"{tmp_path}/two/val/Dog/x.jpeg"
    with pytest.raises(DataError, match=rf"^val_root: {tmp_path}/nowhere is not a folder"):
        open_photos(Where("image_folder", tmp_path / "one", val_root=tmp_path / "nowhere"))


def test_the_order_of_classes_may_be_given(tmp_path: Path) -> None:
    _write(tmp_path)
    (tmp_path / "classes.txt").write_text("cow\ncat\nDog\n")
    train, val = open_photos(Where("image_folder", tmp_path, classes=tmp_path / "classes.txt"))
    assert train.classes == val.classes == ("cow", "cat", "Dog")
    assert train.labels.tolist() == [2, 2, 2, 1, 1, 1]
    assert train.place(0) == f"{tmp_path}/train/Dog/C.Png"
    (tmp_path / "dogs.txt").write_text("cat\ndog\n")
    with pytest.raises(DataError) as caught:
        open_photos(Where("image_folder", tmp_path, classes=tmp_path / "dogs.txt"))
    assert str(caught.value) == (
        f"classes: {tmp_path}/dogs.txt does not list 'Dog', which is a class of train; did you mean 'dog'?"
    )


# --- the listing of before ---


def _aged(root: Path, when: float = 1e9) -> None:
    """All folders were last changed a while ago."""
    for path in [root, *root.rglob("*/")]:
        if path.is_dir():
            os.utime(path, (when, when))


def _names(root: Path, cache: Path) -> list[str]:
    open_photos.cache_clear()
    return list(open_photos(Where("image_folder", root, cache=cache))[0].names)  # type: ignore[attr-defined]


def test_a_listing_is_kept_and_made_anew_where_it_is_wrong(tmp_path: Path) -> None:
    root, cache = tmp_path / "root", tmp_path / "cache"
    _write(root)
    fresh = _names(root, cache)  # from just now, which is too young to be kept
    assert not list(cache.rglob("*.npz"))
    _aged(root)
    _names(root, cache)
    kept = sorted(path.name for path in cache.rglob("*.npz"))
    assert kept == ["train-inside.npz", "val-inside.npz"]

    (root / "train/cat/a.jpg").rename(root / "train/cat/aa.jpg")
    _aged(root)  # so that nobody can see it: the listing that is kept is the one that is used
    assert _names(root, cache) == fresh
    os.utime(root / "train/cat")
    changed = _names(root, cache)
    assert changed == ["C.Png", "a.jpg", "b.JPEG", "C.Png", "aa.jpg", "b.JPEG"]

    _aged(root, 1.1e9)
    assert _names(root, cache) == changed
    for path in cache.rglob("train-*.npz"):
        path.write_bytes(path.read_bytes()[:-40])
    assert _names(root, cache) == changed


def test_a_cache_that_cannot_be_written(tmp_path: Path) -> None:
    _write(tmp_path / "root")
    (tmp_path / "cache").touch()
    with pytest.raises(DataError, match=r"^cache: expected a folder that can be written to, found none: "):
        _names(tmp_path / "root", tmp_path / "cache")


# --- ILSVRC's own validation split ---

_SYNSETS = ("n01440764 tench, Tinca tinca", "n01443537 goldfish", "n01484850 great white shark")


@pytest.fixture
def ilsvrc(tmp_path: Path) -> Path:
    for line in _SYNSETS:
        (tmp_path / "train" / line[:9]).mkdir(parents=True)
        (tmp_path / "train" / line[:9] / "x.JPEG").touch()
    (tmp_path / "val").mkdir()
    for number in range(1, 5):
        (tmp_path / f"val/ILSVRC2012_val_{number:08d}.JPEG").touch()
    # ILSVRC's own numbers count in an order of their own.
    (tmp_path / "ilsvrc.txt").write_text("\n".join([_SYNSETS[2], *_SYNSETS[:2]]))
    return tmp_path


_NAMED = [f"ILSVRC2012_val_{number:08d}.JPEG" for number in range(1, 5)]
_LABELS = {
    "synsets alone": "n01484850\nn01440764\nn01440764\nn01443537\n",
    "files and synsets": "".join(
        f"{n} {_SYNSETS[k][:9]}\n" for n, k in list(zip(_NAMED, (2, 0, 0, 1), strict=True))[::-1]
    ),
    "Caffe's": "".join(f"val/{name} {k}\n" for name, k in zip(_NAMED, (2, 0, 0, 1), strict=True)),
    "Kaggle's": "ImageId,PredictionString\n"
    + "".join(f"{n[:-5]},{_SYNSETS[k][:9]} 85 1 499 272 \n" for n, k in zip(_NAMED, (2, 0, 0, 1), strict=True)),
}


@pytest.mark.parametrize("kind", _LABELS)
def test_flat_validation_images_with_a_file_of_labels(ilsvrc: Path, kind: str) -> None:
    (ilsvrc / "labels").write_text(_LABELS[kind])
    where = Where("image_folder", ilsvrc, val_labels=ilsvrc / "labels")
    _, val = open_photos(where)
    assert val.classes == tuple(line[:9] for line in _SYNSETS)
    assert val.labels.tolist() == [2, 0, 0, 1]
    assert val.place(3) == f"{ilsvrc}/val/{_NAMED[3]}"
    assert open_validation_alone(where, val.classes).labels.tolist() == [2, 0, 0, 1]


def test_ilsvrcs_own_numbers_want_ilsvrcs_own_order(ilsvrc: Path) -> None:
    (ilsvrc / "labels").write_text("1\n2\n2\n3\n")
    where = Where("image_folder", ilsvrc, val_labels=ilsvrc / "labels", classes=ilsvrc / "ilsvrc.txt")
    train, val = open_photos(where)
    assert val.classes == ("n01484850", "n01440764", "n01443537")
    assert train.labels.tolist() == [1, 2, 0]
    assert val.labels.tolist() == [0, 1, 1, 2]
    with pytest.raises(DataError, match=r"its numbers are ILSVRC's own, whose order is not that of the names"):
        open_photos(replace(where, classes=None))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("n01484850\n", "expected a line for each of 4 images, found 1 lines"),
        (
            _LABELS["Caffe's"].replace("00000003.JPEG 0", "00000003.JPEG 3"),
            "expected classes 0 to 2, as there are 3, found 3 for",
        ),
        (_LABELS["Caffe's"].replace("00000003", "00000030"), "has no line for ILSVRC2012_val_00000003.JPEG"),
    ],
)
def test_wrong_files_of_labels(ilsvrc: Path, text: str, message: str) -> None:
    (ilsvrc / "labels").write_text(text)
    with pytest.raises(DataError, match=message):
        open_photos(Where("image_folder", ilsvrc, val_labels=ilsvrc / "labels"))

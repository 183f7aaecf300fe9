"""The listing of a folder of photos, and what is said of folders that are wrong."""

from collections.abc import Callable
from pathlib import Path

import pytest

from data_pipelines import DataConfig, DataError, check_files
from data_pipelines.sources.class_folders import list_folder

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
    train, val = list_folder(tmp_path)
    assert train.classes == val.classes == ("Dog", "cat")
    assert train.names == ["C.Png", "a.jpg", "b.JPEG"] * 2
    assert train.labels.tolist() == [0, 0, 0, 1, 1, 1]
    assert train.path(4) == f"{tmp_path}/train/cat/a.jpg"
    assert [val.path(index) for index in range(2)] == [f"{tmp_path}/val/{label}/x.jpeg" for label in ("Dog", "cat")]


def test_links_inside_the_root_are_followed(tmp_path: Path) -> None:
    root = tmp_path / "root"
    _write(root)
    (root / "train/cat").rename(root / "cats")
    (root / "train/cat").symlink_to("../cats")
    (root / "cats/d.JPEG").symlink_to("b.JPEG")
    (tmp_path / "link").symlink_to("root")
    train, _ = list_folder(tmp_path / "link")
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
        f"{{root}}/train/cat: expected at least one .jpeg, .jpg, .png file, found none.{_GET}",
    ),
    (
        lambda root: (root / "val/cat").rename(root / "val/cow"),
        "{root}: expected the same classes in train and val, found 1 only in train ['cat'] and 1 only in val ['cow']."
        + _GET,
    ),
    (
        _link("train/cat/key.JPEG", "../../../secret/key.JPEG"),
        "{root}/train/cat/key.JPEG: expected a file or folder inside {root}, "
        "found a link to {root.parent}/secret/key.JPEG. Copy it, or link inside.",
    ),
    (
        _link("val/cow", "../../secret"),
        "{root}/val/cow: expected a file or folder inside {root}, found a link to {root.parent}/secret. "
        "Copy it, or link inside.",
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
        list_folder(root)
    assert str(caught.value) == message.format(root=root)


def test_a_global_batch_larger_than_the_folder(tmp_path: Path) -> None:
    pytest.importorskip("nvidia.dali")
    _write(tmp_path)
    check_files(DataConfig(dataset="image_folder", root=tmp_path, global_batch=6))
    with pytest.raises(DataError) as caught:
        check_files(DataConfig(dataset="image_folder", root=tmp_path, global_batch=7))
    assert str(caught.value) == f"global_batch: expected at most the 6 training samples of {tmp_path}, found 7"

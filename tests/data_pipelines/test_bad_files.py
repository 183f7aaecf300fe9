"""Files that cannot be read: replaced alike by all ranks, counted as wrong in validation, told; or the run ends."""

import struct
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from data_pipelines import DataConfig, DataError, Pipeline, open_pipeline
from data_pipelines.decoding.choice import dali_installed
from data_pipelines.sources import files
from tests.data_pipelines import cutting
from tests.data_pipelines.files import photo, write_photos

_DECODERS = ["torchvision", *(["cpu"] if dali_installed() else [])]


def _open(root: Path, decoder: str, **options: Any) -> Pipeline:
    values = {"global_batch": 9, "image": {"size": 32, "resize": 36}, "max_bad": 0.5} | options
    decoding = {"decoder": decoder, "threads": 2}
    return open_pipeline(
        DataConfig(dataset="image_folder", root=root, decoding=decoding, **values), 5, torch.device("cpu")
    )


def _half(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def _without_the_last_percent(path: Path) -> None:
    content = path.read_bytes()
    path.write_bytes(content[: -(len(content) // 100)])


def _chunk(kind: bytes, body: bytes) -> bytes:
    return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))


def _without_pixels(path: Path) -> None:
    header = struct.pack(">IIBBBBB", 0, 0, 8, 2, 0, 0, 0)
    body = [_chunk(b"IHDR", header), _chunk(b"IDAT", zlib.compress(b"")), _chunk(b"IEND", b"")]
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + b"".join(body))


def _undecodable(path: Path) -> None:
    """A PNG with a right header and a right end, and nothing that can be unpacked between them."""
    header = struct.pack(">IIBBBBB", 60, 60, 8, 2, 0, 0, 0)
    body = [_chunk(b"IHDR", header), _chunk(b"IDAT", b"not what zlib has written" * 9), _chunk(b"IEND", b"")]
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + b"".join(body))


def _enormous(path: Path) -> None:
    """A header of 179 megapixels, of which a library thinks an attack; what follows does not matter."""
    header = struct.pack(">IIBBBBB", 15_000, 12_001, 8, 2, 0, 0, 0)
    body = [_chunk(b"IHDR", header), _chunk(b"IDAT", zlib.compress(bytes(9))), _chunk(b"IEND", b"")]
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + b"".join(body))


def _with_a_large_comment(path: Path) -> None:
    """A whole PNG, and in it a compressed text that becomes 2 MB."""
    photo(1, 60, 60).save(path, format="PNG")
    content = path.read_bytes()
    after_header = 8 + 25
    comment = _chunk(b"zTXt", b"Comment\0\0" + zlib.compress(bytes(2_000_000)))
    path.write_bytes(content[:after_header] + comment + content[after_header:])


_KINDS: dict[str, tuple[Callable[[Path], Any], str]] = {
    "vanished": (Path.unlink, "expected an image, found no file"),
    "empty": (lambda path: path.write_bytes(b""), "expected an image, found an empty file"),
    "half": (_half, r"expected a whole image, found \d+ bytes of a JPEG file that was cut short"),
    "almost_whole": (_without_the_last_percent, r"found \d+ bytes of a JPEG file that was cut short"),
    "text": (lambda path: path.write_text("<html>"), "expected a JPEG or PNG image, found a file that is neither"),
    "no_pixels": (_without_pixels, "expected an image, found 0 x 0 pixels|found a file that is neither"),
    "undecodable": (_undecodable, r"expected a whole image, found \d+ bytes that cannot be decoded"),
    "enormous": (_enormous, r"expected a smaller image: Image size \(180015000 pixels\) exceeds limit"),
    "comment": (_with_a_large_comment, "cannot be read: Decompressed data too large|expected a (JPEG|smaller)"),
    "folder": (lambda path: (path.unlink(), path.mkdir()), "cannot be read: Is a directory"),
}


@pytest.mark.parametrize("decoder", _DECODERS)
@pytest.mark.parametrize("kind", _KINDS)
def test_every_kind_of_damage(tmp_path: Path, kind: str, decoder: str) -> None:
    break_it, reason = _KINDS[kind]
    write_photos(tmp_path, train=4, val=3)
    pipeline = _open(tmp_path, decoder)
    raising = _open(tmp_path, decoder, on_error="raise")
    trained, scored = tmp_path / "train/n001/01.JPEG", tmp_path / "val/n002/02.JPEG"
    for path in (trained, scored):
        break_it(path)

    # Sample 5 is the second of four of class 1: the next is 6.
    plain = _open(tmp_path, decoder, global_batch=12)
    (batch,) = plain.train(0, 0, slice(0, 12))
    assert sorted(batch.ids.tolist()) == [0, 1, 2, 3, 4, 6, 6, 7, 8, 9, 10, 11]
    assert batch.targets.tolist() == [i // 4 for i in batch.ids.tolist()]
    whole = cutting.join(list(pipeline.evaluate(0, 1, 4)))
    assert whole.ids.tolist() == list(range(9))
    assert whole.targets.tolist() == [0, 0, 0, 1, 1, 1, 2, 2, -1]
    parts = [b for part in range(2) for b in pipeline.evaluate(part, 2, 2)]
    assert cutting.same(cutting.join(parts), whole)
    assert plain.damage is not None
    (told,) = plain.damage.take()
    assert (told.split, told.path) == ("train", str(trained))
    with pytest.raises(DataError, match=reason):
        list(raising.evaluate(0, 1, 4))
    for each in (plain, pipeline, raising):
        each.close()


@pytest.mark.parametrize("decoder", _DECODERS)
@pytest.mark.parametrize("sampler", ["shuffle", "class_tuples"])
def test_rows_do_not_depend_on_ranks_nor_on_the_place_in_the_epoch(tmp_path: Path, decoder: str, sampler: str) -> None:
    write_photos(tmp_path, classes=3, train=12, val=2)
    recipe = {"mixing": {"mixup_alpha": 0.4}, "policy": {"name": "trivial_augment"}}
    pipeline = _open(
        tmp_path, decoder, sampler=sampler, global_batch=4, augmentation={} if sampler == "shuffle" else recipe
    )
    for name, break_it in (("n000/03.png", Path.unlink), ("n000/04.JPEG", _undecodable), ("n002/11.JPEG", _half)):
        path = tmp_path / "train" / name
        break_it(path if path.exists() else path.with_suffix(".JPEG"))
    whole = list(pipeline.train(0, 0, slice(0, 4)))
    bad = {3, 4, 35}
    seen = torch.cat([batch.ids for batch in whole]).tolist()
    assert not bad & set(seen)
    if sampler == "class_tuples":
        return pipeline.close()
    # Each other sample once, and 5 and 24 in the place of those before them.
    assert sorted(seen) == sorted([*(set(range(36)) - bad), 5, 5, 24])
    for share in (1, 2):
        streams = [list(pipeline.train(0, 0, slice(r, r + share))) for r in range(0, 4, share)]
        for step, expected in enumerate(whole):
            assert cutting.same(cutting.join([stream[step] for stream in streams]), expected)
    again = list(pipeline.train(0, 5, slice(0, 4)))
    assert all(cutting.same(a, b) for a, b in zip(again, whole[5:], strict=True))
    return pipeline.close()


def test_nothing_is_replaced_by_what_is_held_out(tmp_path: Path) -> None:
    write_photos(tmp_path, train=12)
    pipeline = _open(tmp_path, "torchvision", held_out=0.4, global_batch=3)
    held_out = set(torch.cat([b.ids for b in pipeline.held_out(0, 1, 5)]).tolist())
    for index, path in enumerate(sorted((tmp_path / "train/n000").iterdir())):
        if index % 3 == 0:
            path.unlink()
    for epoch in range(2):
        for batch in pipeline.train(epoch, 0, slice(0, 3)):
            assert not held_out & set(batch.ids.tolist())
    surveyed = torch.cat([b.ids for b in pipeline.held_out(0, 1, 5)]).tolist()
    assert set(surveyed) < held_out
    assert len(surveyed) == len(held_out)
    pipeline.close()


@pytest.fixture
def no_waiting(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    waited: list[float] = []
    monkeypatch.setattr(files.time, "sleep", waited.append)
    return waited


def test_a_disk_with_errors_is_asked_again(no_waiting: list[float]) -> None:
    """The first page of a process's memory is not mapped, and reading it is an input/output error."""
    with pytest.raises(files.UnreadableError, match=r"^cannot be read: Input/output error$"):
        files.read_bytes("/proc/self/mem")
    assert no_waiting == [0.1, 1.0, 5.0]


@pytest.mark.parametrize(("max_bad", "ends"), [(0.5, False), (0.1, True), (0.0, True)])
def test_too_many(tmp_path: Path, max_bad: float, ends: bool) -> None:
    write_photos(tmp_path, train=6)
    pipeline = _open(tmp_path, "torchvision", max_bad=max_bad, global_batch=18)
    for name in ("n000/00", "n001/00", "n002/00"):
        (tmp_path / "train" / f"{name}.JPEG").unlink()
    if not ends:
        assert len(list(pipeline.train(0, 0, slice(0, 18)))) == 1
        assert pipeline.damage is not None
        assert pipeline.damage.counts == {"train": 3, "val": 0}
    else:
        wanted = (
            rf"max_bad: \d of 18 train files cannot be read, more than max_bad = {max_bad:g} of them; one is {tmp_path}"
        )
        with pytest.raises(DataError, match=wanted):
            list(pipeline.train(0, 0, slice(0, 18)))
    pipeline.close()


def test_a_class_of_which_nothing_is_left(tmp_path: Path) -> None:
    write_photos(tmp_path, train=3)
    for path in (tmp_path / "train/n001").iterdir():
        path.unlink()
    (tmp_path / "train/n001/00.JPEG").touch()
    pipeline = _open(tmp_path, "torchvision", max_bad=1.0, global_batch=7)
    with pytest.raises(DataError, match=r"n001: expected at least one image that can be read, found 1 that cannot"):
        list(pipeline.train(0, 0, slice(0, 7)))
    pipeline.close()


def test_whole_files_of_every_kind_are_whole(tmp_path: Path) -> None:
    from tests.data_pipelines.decoding.test_decoders import _write_kinds

    _write_kinds(tmp_path / "kinds")
    for path in (tmp_path / "kinds").iterdir():
        content = path.read_bytes()
        assert files.measured(content) == (90, 120), path
        for cut in (1, 2, len(content) // 100 + 2, len(content) // 2):
            if path.stem.startswith("png") and cut < 9:
                continue  # the checksum of a PNG's last part, which holds nothing
            with pytest.raises(files.UnreadableError):
                files.measured(content[:-cut])

"""DALI and torchvision behind one interface: nearly the same pixels, of every kind of file that ImageNet has."""

import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from data_pipelines import DataConfig, Pipeline, open_pipeline
from data_pipelines.contract import DataError
from data_pipelines.decoding.choice import choose
from data_pipelines.decoding.contract import Plan, Work
from data_pipelines.decoding.with_torchvision import TorchvisionDecoder
from tests.data_pipelines import cutting
from tests.data_pipelines.files import photo, write_photos

_CPU = torch.device("cpu")


def _save(image: Image.Image, path: Path, kind: str, **options: object) -> None:
    with path.open("wb") as file:
        image.save(file, format=kind, **options)


def _write_kinds(folder: Path) -> dict[str, Image.Image]:
    """One photo in many kinds of file, all of them called JPEG; gives what each shows, RGB."""
    image = photo(3, 120, 90)
    exif = Image.Exif()
    exif[0x0112] = 6
    cmyk = image.convert("CMYK")
    folder.mkdir(parents=True)
    files = {
        "baseline": (image, "JPEG", {"quality": 95}),
        "progressive": (image, "JPEG", {"quality": 95, "progressive": True}),
        "full_colour": (image, "JPEG", {"quality": 95, "subsampling": 0}),
        "rotated": (image, "JPEG", {"quality": 95, "exif": exif}),
        "grey": (image.convert("L"), "JPEG", {"quality": 95}),
        "cmyk": (cmyk, "JPEG", {"quality": 95}),
        "ycck": (_ycck(cmyk), "JPEG", {"quality": 95}),
        "png": (image, "PNG", {}),
        "png_grey": (image.convert("L"), "PNG", {}),
        "png_palette": (image.quantize(64), "PNG", {}),
        "webp": (image, "WEBP", {"lossless": True}),
        "bmp": (image, "BMP", {}),
    }
    for name, (shown, kind, options) in files.items():
        _save(shown, folder / f"{name}.JPEG", kind, **options)
    _say_ycck(folder / "ycck.JPEG")
    return {name: Image.open(folder / f"{name}.JPEG").convert("RGB") for name in files}


def _ycck(cmyk: Image.Image) -> Image.Image:
    """What PIL stores of it, inverted, are the planes of a YCCK file: C, M and Y as luma and chroma, and K."""
    *colours, black = cmyk.split()
    turned = Image.merge("RGB", colours).convert("YCbCr").split()
    return Image.merge("CMYK", [*(plane.point(lambda level: 255 - level) for plane in turned), black])


def _say_ycck(path: Path) -> None:
    """Sets the transform of Adobe's marker to 2; PIL writes 0, for CMYK."""
    content = bytearray(path.read_bytes())
    place = content.index(b"Adobe") + 11
    assert content[place] == 0
    content[place] = 2
    path.write_bytes(content)


def _pixels(root: Path, decoder: str) -> torch.Tensor:
    """The validation images, as large as they are, uint8 [n, 3, 90, 90]."""
    config = DataConfig(
        dataset="image_folder",
        root=root,
        global_batch=2,
        image={"size": 90, "resize": 90},
        decoding={"decoder": decoder, "threads": 2},
        mean=[0.0] * 3,
        std=[1 / 255] * 3,
    )
    pipeline = open_pipeline(config, 1, _CPU)
    images = cutting.join(list(pipeline.evaluate(0, 1, 4))).images
    pipeline.close()
    return images


@pytest.mark.parametrize("decoder", ["torchvision", "cpu"])
def test_every_kind_of_file(tmp_path: Path, decoder: str) -> None:
    """Against PIL, whose libjpeg is another: within one level on average, and orientation is not obeyed."""
    if decoder == "cpu":
        pytest.importorskip("nvidia.dali")
    shown = _write_kinds(tmp_path / "val" / "a")
    _write_kinds(tmp_path / "train" / "a")
    found = _pixels(tmp_path, decoder)
    for pixels, name in zip(found, sorted(shown), strict=True):
        expected = torch.from_numpy(np.array(shown[name])).permute(2, 0, 1)[:, :, 15:105].float()
        tolerance = 3.0 if name in ("cmyk", "ycck") else 1.0
        assert (pixels - expected).abs().mean() < tolerance, name


def _opened(root: Path, decoder: str, **options: object) -> Pipeline:
    values = {"global_batch": 8, "image": {"size": 48, "resize": 56}} | options
    decoding = {"decoder": decoder, "threads": 2}
    constants = {"mean": [0.0] * 3, "std": [1 / 255] * 3}
    return open_pipeline(
        DataConfig(dataset="image_folder", root=root, decoding=decoding, **constants, **values), 5, _CPU
    )


@pytest.mark.parametrize("interpolation", ["bilinear", "bicubic"])
def test_both_show_the_same_windows(tmp_path: Path, interpolation: str) -> None:
    """Within 2 levels on average: they scale with other filters' roundings, and crop and flip alike."""
    pytest.importorskip("nvidia.dali")
    write_photos(tmp_path)
    image = {"size": 48, "resize": 56, "interpolation": interpolation}
    ours, dali = (_opened(tmp_path, decoder, image=image) for decoder in ("torchvision", "cpu"))
    for a, b in zip(ours.train(0, 0, slice(0, 8)), dali.train(0, 0, slice(0, 8)), strict=True):
        assert a.ids.tolist() == b.ids.tolist()
        assert a.targets.tolist() == b.targets.tolist()
        assert (a.images - b.images).abs().mean() < 2
        assert (a.images - b.images).abs().flatten(1).mean(1).max() < 6
    for a, b in zip(ours.evaluate(0, 1, 5), dali.evaluate(0, 1, 5), strict=True):
        assert (a.images - b.images).abs().mean() < 2
    ours.close()
    dali.close()


def test_rows_do_not_depend_on_the_cut_nor_on_the_views(tmp_path: Path) -> None:
    write_photos(tmp_path)
    pipeline = _opened(tmp_path, "torchvision")
    cutting.assert_rows_do_not_depend_on_the_cut(pipeline)
    cutting.assert_a_view_is_the_same_in_any_company(pipeline)
    cutting.assert_each_validation_row_comes_once(pipeline)
    pipeline.close()


def test_a_header_that_promises_too_much() -> None:
    encoded = np.frombuffer(_encoded(photo(1, 40, 30)), np.uint8)
    with ThreadPoolExecutor(1) as pool:
        decoder = TorchvisionDecoder(Plan(1, 1, False, 8), pool)
        window, size = np.zeros((1, 1, 2), np.int64), np.full((1, 1, 2), 50)
        decoder.feed(
            Work(np.zeros(1, np.int64), [encoded], window, size, size[0], window[0], np.zeros((1, 1), np.int32))
        )
        with pytest.raises(RuntimeError, match="expected 50 x 50 pixels or more"):
            decoder.take()


def _encoded(image: Image.Image) -> bytes:
    import io

    buffer = io.BytesIO()
    image.save(buffer, format="PNG")
    return buffer.getvalue()


def test_auto_says_what_it_chose_and_why(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("nvidia.dali")
    assert str(choose("auto", cuda=False)) == (
        "torchvision on the CPU: the images are wanted on the CPU, where it was measured to be faster than DALI"
    )
    assert choose("cpu", cuda=False).name == "cpu"
    assert choose("auto", cuda=True).name == "mixed"
    assert choose("torchvision", cuda=True).name == "torchvision"
    monkeypatch.setitem(sys.modules, "nvidia.dali", None)
    assert str(choose("auto", cuda=True)).startswith("torchvision on the CPU: NVIDIA DALI is not installed")
    with pytest.raises(DataError, match=r"^decoding.decoder: cpu needs NVIDIA DALI; expected auto or torchvision"):
        choose("cpu", cuda=False)


def test_a_ycck_file_shows_what_its_cmyk_sister_does(tmp_path: Path) -> None:
    shown = _write_kinds(tmp_path / "a")
    with Image.open(tmp_path / "a" / "ycck.JPEG") as image:
        assert (image.mode, image.info["adobe_transform"]) == ("CMYK", 2)
    # Grain, coded twice; to take one colour space for the other is to be off by 50 levels and more.
    assert np.abs(np.asarray(shown["ycck"], float) - np.asarray(shown["cmyk"], float)).mean() < 4

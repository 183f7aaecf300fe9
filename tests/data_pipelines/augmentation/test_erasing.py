"""Random erasing and Cutout."""

import numpy as np
import pytest
import torch

from data_pipelines import order
from data_pipelines.augmentation.erasing import (
    CUTOUT_COLUMNS,
    Boxes,
    columns,
    cutout_boxes,
    erase,
    erasing_boxes,
)
from data_pipelines.augmentation.sections import ErasingConfig

_SIDE = 64


def _boxes(config: ErasingConfig, rows: slice = slice(None), count: int = 8000) -> Boxes:
    uniforms = order.uniforms("erasing", 1, 0, 0, count, columns(config))
    [boxes] = erasing_boxes(config, uniforms, rows, _SIDE)
    return boxes


def test_boxes_are_within_their_ranges() -> None:
    boxes = _boxes(ErasingConfig(prob=0.25))
    assert len(boxes.rows) / 8000 == pytest.approx(0.25, abs=0.02)
    top, bottom, left, right = boxes.edges.T
    assert (top >= 0).all()
    assert (bottom <= _SIDE).all()
    assert (left >= 0).all()
    assert (right <= _SIDE).all()
    heights, widths = bottom - top, right - left
    area = heights * widths / _SIDE**2
    # Sides are rounded to whole pixels.
    assert area.min() > 0.02 - 0.005
    assert area.max() < 1 / 3 + 0.02
    assert area.mean() == pytest.approx((0.02 + 1 / 3) / 2, abs=0.01)
    # As likely upright as lying.
    assert np.log(heights / widths).mean() == pytest.approx(0, abs=0.05)
    # Each place where a box fits is equally likely.
    assert (top / (_SIDE - heights + 1e-9)).mean() == pytest.approx(0.5, abs=0.02)


def test_several_rectangles_share_the_area() -> None:
    """timm's max_count: of m = 1 .. 3 rectangles, all as likely, each has 1/m of an area of its own."""
    config = ErasingConfig(prob=0.5, max_count=3, area=(0.3, 0.3))
    uniforms = order.uniforms("erasing", 1, 0, 0, 6000, columns(config))
    boxes = erasing_boxes(config, uniforms, slice(None), _SIDE)
    sets = [set(each.rows.tolist()) for each in boxes]
    assert sets[2] < sets[1] < sets[0]
    assert [len(each) / 6000 for each in sets] == pytest.approx([1 / 2, 1 / 3, 1 / 6], abs=0.02)
    for each in boxes:
        count = np.array([1 + (row in sets[1]) + (row in sets[2]) for row in each.rows.tolist()])
        top, bottom, left, right = each.edges.T
        assert (bottom - top) * (right - left) / _SIDE**2 == pytest.approx(0.3 / count, abs=0.02)
    places = [dict(zip(each.rows.tolist(), each.edges.tolist(), strict=True)) for each in boxes]
    assert all(places[0][row] != places[1][row] for row in sets[1])


def test_rows_are_cut_out_of_the_global_batch() -> None:
    whole, part = _boxes(ErasingConfig(prob=0.5)), _boxes(ErasingConfig(prob=0.5), slice(100, 300))
    inside = (whole.rows >= 100) & (whole.rows < 300)
    assert (part.rows + 100 == whole.rows[inside]).all()
    assert (part.edges == whole.edges[inside]).all()
    assert (part.seeds == whole.seeds[inside]).all()


@pytest.mark.parametrize("mode", ["const", "rand", "pixel"])
def test_what_is_painted(mode: str) -> None:
    images = torch.full((3, 3, _SIDE, _SIDE), 9.0)
    rows, edges = torch.tensor([0, 2]), torch.tensor([[0, 50, 0, 60], [10, 60, 20, 64]])
    seeds = torch.tensor([5, (1 << 32) - 1])
    erase(images, rows, edges, seeds, mode)
    assert (images[1] == 9).all()
    first, last = images[0, :, :50, :60], images[2, :, 10:60, 20:]
    assert (images == 9).sum() == images.numel() - first.numel() - last.numel()
    if mode == "const":
        assert not first.any()
        assert not last.any()
    elif mode == "rand":
        assert (first == first[:, :1, :1]).all()
        assert len({*first[:, 0, 0].tolist(), *last[:, 0, 0].tolist()}) == 6
    else:
        for noise in (first, last):
            assert noise.mean().item() == pytest.approx(0, abs=0.04)
            assert noise.std().item() == pytest.approx(1, abs=0.03)
            # Neighbours, lines and channels have nothing to do with each other.
            for shifted in (noise.roll(1, 0), noise.roll(1, 1), noise.roll(1, 2)):
                assert abs((noise * shifted).mean().item()) < 0.05
        alone = torch.full((1, 3, _SIDE, _SIDE), 9.0)
        erase(alone, torch.tensor([0]), edges[1:], seeds[1:], mode)
        assert torch.equal(alone[0], images[2])


def test_cutout_is_a_square_cut_off_at_the_edge() -> None:
    uniforms = order.uniforms("cutout", 1, 0, 0, 20_000, CUTOUT_COLUMNS)
    boxes = cutout_boxes(16, uniforms, slice(None), 32)
    top, bottom, left, right = boxes.edges.T
    assert set((bottom - top).tolist()) == set(range(8, 17))
    inside = (top > 0) & (bottom < 32) & (left > 0) & (right < 32)
    assert ((bottom - top)[inside] == 16).all()
    assert ((right - left)[inside] == 16).all()
    # The middle is any pixel: a third of the 32 are so near an edge that something is missing.
    assert ((bottom - top) < 16).mean() == pytest.approx(15 / 32, abs=0.02)
    assert len(boxes.rows) == 20_000

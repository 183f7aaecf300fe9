"""Whatever is asked for: shapes, types and ranges, and rows that are the same bits however a batch is cut."""

from __future__ import annotations

import itertools
from typing import Any

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from data_pipelines.augmentation.chain import Augmenter
from data_pipelines.augmentation.sections import Augmentations

_CPU = torch.device("cpu")
_LEVELS = ([0.0] * 3, [1 / 255] * 3)  # what is normalised so is levels still
_ROWS, _SIDE, _CLASSES = 12, 20, 5

_probabilities = st.sampled_from([0.0, 0.5, 1.0])
_policies = st.one_of(
    st.builds(dict, name=st.sampled_from(["none", "trivial_augment", "auto_augment_cifar10", "three_augment"])),
    st.builds(dict, name=st.just("rand_augment"), num_ops=st.integers(1, 4), magnitude=st.integers(0, 30).map(float)),
    st.builds(
        dict,
        name=st.just("timm_rand_augment"),
        magnitude=st.floats(0, 10),
        magnitude_std=st.floats(0, 2),
        increasing=st.booleans(),
        interpolation=st.sampled_from(["nearest", "bilinear"]),
        fill=st.one_of(st.none(), st.integers(0, 255)),
    ),
)
_recipes = st.fixed_dictionaries(
    {
        "policy": _policies,
        "color_jitter": st.builds(
            dict,
            brightness=st.floats(0, 2),
            contrast=st.floats(0, 2),
            saturation=st.floats(0, 2),
            hue=st.floats(0, 0.5),
            prob=_probabilities,
        ),
        "grayscale_prob": _probabilities,
        "solarize_prob": _probabilities,
        "gaussian_blur_prob": _probabilities,
        "cutout": st.integers(0, 2 * _SIDE),
        "erasing": st.builds(
            dict,
            prob=_probabilities,
            mode=st.sampled_from(["const", "rand", "pixel"]),
            max_count=st.integers(1, 4),
        ),
        "mixing": st.builds(
            dict,
            mixup_alpha=st.sampled_from([0.0, 0.2, 1.0]),
            cutmix_alpha=st.sampled_from([0.0, 1.0]),
            mode=st.sampled_from(["batch", "pair", "elem"]),
        ),
        "label_smoothing": st.sampled_from([0.0, 0.1]),
    }
)


@settings(max_examples=20, deadline=None)
@given(
    recipe=_recipes,
    seed=st.integers(0, 2**63),
    epoch=st.integers(0, 300),
    step=st.integers(0, 5000),
    cuts=st.sets(st.integers(1, _ROWS // 2 - 1)),
)
def test_any_recipe(recipe: dict[str, Any], seed: int, epoch: int, step: int, cuts: set[int]) -> None:
    config = Augmentations(**recipe)
    augmenter = Augmenter(config, seed, _LEVELS, _CLASSES, 1, _CPU)
    generator = torch.Generator().manual_seed(seed % 2**32)
    pixels = [torch.randint(0, 256, (_ROWS, _SIDE, _SIDE, 3), dtype=torch.uint8, generator=generator) for _ in "ab"]
    classes = torch.randint(0, _CLASSES, (_ROWS,), generator=generator)

    def shown(rows: slice, views: tuple[int, ...]) -> tuple[tuple[torch.Tensor, ...], torch.Tensor]:
        drawn = augmenter.draw(epoch, step, _ROWS, rows, _SIDE, views)
        return augmenter([pixels[view][rows].clone() for view in views], classes[rows], drawn)

    images, targets = shown(slice(0, _ROWS), (0, 1))
    for view in images:
        assert (view.shape, view.dtype) == ((_ROWS, 3, _SIDE, _SIDE), torch.float32)
        assert view.is_contiguous(memory_format=torch.channels_last)
        assert view.isfinite().all()
        if recipe["erasing"]["prob"] == 0 or recipe["erasing"]["mode"] == "const":
            assert view.min() >= -1e-3
            assert view.max() <= 255 + 1e-3
    if config.soft_targets:
        assert (targets.shape, targets.dtype) == ((_ROWS, _CLASSES), torch.float32)
        assert torch.allclose(targets.sum(1), torch.ones(_ROWS), atol=1e-5)
        assert targets.min() >= 0
    else:
        assert torch.equal(targets, classes)

    # Pairs that are mixed lie side by side, so a batch may be cut at any even row.
    edges = [0, *sorted(2 * cut for cut in cuts), _ROWS]
    parts = [shown(slice(begin, end), (1,)) for begin, end in itertools.pairwise(edges)]
    assert torch.equal(torch.cat([view for (view,), _ in parts]), images[1])
    assert torch.equal(torch.cat([some for _, some in parts]), targets)

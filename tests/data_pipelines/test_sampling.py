"""Epochs of another number of steps than the images fill: those of a run whose images were added or lost."""

import numpy as np
import pytest

from data_pipelines import DataConfig
from data_pipelines.sampling import Sampling


def sampling(sampler: str) -> Sampling:
    """19 images of two classes in batches of 4."""
    config = DataConfig(dataset="cifar10", root="data", global_batch=4, sampler=sampler)
    return Sampling(config, 3, np.arange(19) % 2, ("a", "b"))


@pytest.mark.parametrize("sampler", ["shuffle", "class_balanced"])
@pytest.mark.parametrize("steps", [2, 4, 6, 13])
def test_an_epoch_begins_alike_however_many_steps_it_has(sampler: str, steps: int) -> None:
    drawn = sampling(sampler)
    longest, epoch = drawn.epoch(1, 13), drawn.epoch(1, steps)
    assert epoch.shape == (steps, 4)
    assert np.array_equal(epoch, longest[:steps])


def test_all_images_are_shown_before_any_is_shown_again() -> None:
    epoch = sampling("shuffle").epoch(0, 13).ravel()
    first, second = epoch[:19], epoch[19:38]
    assert sorted(first) == sorted(second) == list(range(19))
    assert not np.array_equal(first, second)

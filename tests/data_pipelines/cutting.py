"""Promise 2, for any pipeline: what a row of a step is does not depend on who asks for it, or how."""

import numpy as np
import torch

from data_pipelines import Batch, Pipeline, order


def same(a: Batch, b: Batch) -> bool:
    """Returns whether two batches are equal bit for bit, in all views."""
    views = len(a.views) == len(b.views) and all(map(torch.equal, a.views, b.views))
    return views and torch.equal(a.targets, b.targets) and torch.equal(a.ids, b.ids)


def join(batches: list[Batch]) -> Batch:
    """Puts batches back together."""
    views = tuple(torch.cat(parts) for parts in zip(*(batch.views for batch in batches), strict=True))
    return Batch(views, *(torch.cat([getattr(batch, key) for batch in batches]) for key in ("targets", "ids")))


def assert_rows_do_not_depend_on_the_cut(pipeline: Pipeline) -> None:
    """Compares whole global batches with the same ones cut in 2, 3 and 4 uneven parts."""
    whole = list(pipeline.train(1, 0, slice(0, pipeline.global_batch)))
    assert len(whole) == pipeline.steps_per_epoch
    for parts in (2, 3, 4):
        cut = [order.part(pipeline.global_batch, index, parts) for index in range(parts)]
        streams = [list(pipeline.train(1, 0, slice(rows.start, rows.stop))) for rows in cut]
        for step, expected in enumerate(whole):
            assert same(join([stream[step] for stream in streams]), expected)


def assert_an_epoch_can_begin_anywhere(pipeline: Pipeline) -> None:
    """Compares the end of an epoch with the epoch begun there, and two epochs with each other."""
    rows = slice(0, pipeline.global_batch)
    whole = list(pipeline.train(2, 0, rows))
    for first in range(1, pipeline.steps_per_epoch + 1):
        rest = list(pipeline.train(2, first, rows))
        assert len(rest) == pipeline.steps_per_epoch - first
        assert all(same(a, b) for a, b in zip(rest, whole[first:], strict=True))
    assert not torch.equal(join(list(pipeline.train(3, 0, rows))).ids, join(whole).ids)


def assert_an_epoch_shows_no_sample_twice(pipeline: Pipeline) -> None:
    """Looks through one epoch."""
    ids = join(list(pipeline.train(2, 0, slice(0, pipeline.global_batch)))).ids
    assert len(ids.unique()) == len(ids) == pipeline.steps_per_epoch * pipeline.global_batch


def assert_batches_are_made_of_classes(pipeline: Pipeline, images: int) -> None:
    """Looks for tuples of different images of one class, a class once a batch, in two epochs."""
    for epoch in range(2):
        for batch in pipeline.train(epoch, 0, slice(0, pipeline.global_batch)):
            targets = batch.targets.view(-1, images)
            assert (targets == targets[:, :1]).all()
            assert len(targets[:, 0].unique()) == len(targets)
            assert len(batch.ids.unique()) == len(batch.ids)


def assert_each_validation_row_comes_once(pipeline: Pipeline) -> None:
    """Compares the validation split in one batch with the same cut into parts and batches of many sizes."""
    (whole,) = pipeline.evaluate(0, 1, pipeline.eval_size)
    assert whole.ids.tolist() == list(range(pipeline.eval_size))
    for parts, batch in ((1, 4), (2, 3), (3, pipeline.eval_size), (4, 1), (pipeline.eval_size + 3, 2)):
        batches = [list(pipeline.evaluate(part, parts, batch)) for part in range(parts)]
        assert same(join([each for part in batches for each in part]), whole)
        sizes = [[len(each.ids) for each in part] for part in batches]
        assert all(size == batch for part in sizes for size in part[:-1])
        assert all(0 < size <= batch for part in sizes for size in part)


def assert_a_batch_is_as_promised(pipeline: Pipeline, labels: np.ndarray) -> None:
    """Checks shapes, types, memory and the targets of the first batch."""
    batch = next(iter(pipeline.train(0, 0, slice(1, 4))))
    side = pipeline.image_size
    assert batch.images.shape == (3, pipeline.channels, side, side)
    assert batch.images.is_contiguous(memory_format=torch.channels_last)
    assert (batch.images.dtype, batch.targets.dtype, batch.ids.dtype) == (torch.float32, torch.int64, torch.int64)
    assert batch.targets.tolist() == labels[batch.ids.numpy()].tolist()


def assert_a_view_is_the_same_in_any_company(pipeline: Pipeline) -> None:
    """Compares each of three views alone with the same among others, in any order, on any rows."""
    rows = slice(0, pipeline.global_batch)
    together = list(pipeline.train(1, 0, rows, (0, 1, 2)))
    for views in ((0,), (1,), (2,), (2, 0)):
        for few, all_three in zip(pipeline.train(1, 0, rows, views), together, strict=True):
            assert same(few, Batch(tuple(all_three.views[v] for v in views), all_three.targets, all_three.ids))
    part = slice(1, 4)
    for few, whole in zip(pipeline.train(1, 0, part, (1, 2)), together, strict=True):
        cut = tuple(whole.views[v][part] for v in (1, 2))
        assert same(few, Batch(cut, whole.targets[part], whole.ids[part]))
    assert all(same(a, b) for a, b in zip(pipeline.train(1, 0, rows), pipeline.train(1, 0, rows, (0,)), strict=True))
    for batch in together:
        for a, b in ((0, 1), (0, 2), (1, 2)):
            differ = (batch.views[a] != batch.views[b]).flatten(1).any(1)
            assert differ.float().mean() > 0.7, "views of an image are drawn independently"


def assert_what_is_held_out_is_never_trained_on(pipeline: Pipeline, count: int, labels: np.ndarray) -> None:
    """Compares two epochs with the samples held out, and these with the same cut into parts and batches."""
    size = len(labels)
    assert (pipeline.held_out_size, pipeline.train_size) == (count, size - count)
    (whole,) = pipeline.held_out(0, 1, count)
    assert len(set(whole.ids.tolist())) == count
    assert whole.targets.tolist() == labels[whole.ids.numpy()].tolist()
    rows = slice(0, pipeline.global_batch)
    trained_on = {i for epoch in range(12) for batch in pipeline.train(epoch, 0, rows) for i in batch.ids.tolist()}
    assert trained_on == set(range(size)) - set(whole.ids.tolist())
    targets = labels.copy()
    targets[whole.ids.numpy()] = -1
    assert pipeline.train_targets.dtype == np.int64
    assert pipeline.train_targets.tolist() == targets.tolist()
    for parts, batch in ((1, 2), (2, 3), (3, count), (count + 2, 1)):
        batches = [each for part in range(parts) for each in pipeline.held_out(part, parts, batch)]
        assert same(join(batches), whole)

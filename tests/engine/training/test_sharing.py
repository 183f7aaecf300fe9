"""Every row is decoded once a node, and is what it is without."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist

from data_pipelines.decoding.contract import Decoder, Plan, Work
from data_pipelines.image_folder import ImageFolder
from engine.config import ConfigError
from engine.config.loading import validate
from engine.preflight import check_run
from engine.ranks.collectives import Launch
from engine.ranks.placement import Group, Placement
from engine.ranks.planning.choosing import balanced
from engine.training.sharing import counted_of, related, share_decoding, shares
from tests.data_pipelines.files import write_photos
from tests.engine.stepping import config_of
from tests.marks import slow
from tests.runs import assert_same_weights, small_run, train_here, weights
from tests.worlds import run_ranks, run_world

PHOTO = {"dataset": "image_folder", "global_batch": 8, "image": {"size": 32, "resize": 40}}


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("photos")
    write_photos(root)
    return root


class _Counted(ImageFolder):
    """Counts the photos that its decoders are fed with."""

    fed = 0

    def _decoder(self, plan: Plan) -> Decoder:
        inner, outer = super()._decoder(plan), self

        class Counting:
            def feed(self, work: Work) -> None:
                outer.fed += len(work.ids)
                inner.feed(work)

            take = inner.take

        return Counting()


def an_epoch(config: Any, kinds: Placement, *, shared: bool) -> tuple[list[Any], int, int]:
    """Views, targets and ids of the batches of an epoch, the photos decoded for it, and how many share."""
    pipeline = _Counted(config.data, 3, torch.device("cpu"))
    placement = kinds.of(dist.get_rank())
    if shared:
        share_decoding(config, placement, pipeline)
    rows = placement.rows(config.data.global_batch, config.train.accumulation, config.data.tuple_size)
    found = [(batch.images.clone(), batch.targets, batch.ids) for batch in pipeline.train(1, 1, rows)]
    pipeline.close()
    return found, pipeline.fed, len(pipeline.sharing.rows) if pipeline.sharing else 0


def both(config: Any, kinds: Placement) -> tuple[Any, Any]:
    return an_epoch(config, kinds, shared=False), an_epoch(config, kinds, shared=True)


PLACEMENTS = {
    "two peers, a rank each": Placement.even(2, 1, 2, 0),
    "two peers, two ranks each": Placement.even(2, 1, 4, 0),
    "three ranks and one": Placement(2, (Group((0,), (0, 1, 2)), Group((1,), (3,))), 0),
}


@pytest.mark.parametrize("decoder", ["cpu", slow("torchvision")])
@pytest.mark.parametrize("name", PLACEMENTS)
def test_pixels_are_the_same_bits_and_every_row_is_decoded_once(photos: Path, name: str, decoder: str) -> None:
    kinds = PLACEMENTS[name]
    data = {**PHOTO, "root": str(photos), "decoding": {"decoder": decoder, "threads": 2}}
    config = config_of({"name": "dml"}, 2, data=data)
    outcomes = run_world(kinds.world, both, config, kinds)
    steps = len(outcomes[0][0][0])
    assert steps == 2  # of 27 photos in batches of 8, from the second
    for alone, shared in outcomes:
        for one, other in zip(alone[0], shared[0], strict=True):
            assert all(torch.equal(a, b) for a, b in zip(one, other, strict=True))
    assert sum(alone[1] for alone, _ in outcomes) == 2 * 8 * steps
    assert sum(shared[1] for _, shared in outcomes) == 8 * steps
    assert all(shared[2] for _, shared in outcomes)


def test_photos_that_cannot_be_decoded_are_replaced_alike(photos: Path, tmp_path: Path) -> None:
    """One is cut off in the middle of its pixels, with its end put back, so that only a decoder finds out."""
    write_photos(tmp_path / "bad")
    path = next((tmp_path / "bad" / "train" / "n000").glob("00.*"))
    content = path.read_bytes()
    path.write_bytes(content[: len(content) // 3] + bytes(200) + b"\xff\xd9")
    data = {
        **PHOTO,
        "root": str(tmp_path / "bad"),
        "max_bad": 0.5,
        "decoding": {"decoder": "torchvision", "threads": 2},
    }
    config = config_of({"name": "dml"}, 2, data=data)
    for alone, shared in run_world(2, both, config, Placement.even(2, 1, 2, 0)):
        for one, other in zip(alone[0], shared[0], strict=True):
            assert all(torch.equal(a, b) for a, b in zip(one, other, strict=True))


def photo_run(photos: Path, folder: Path, shared: str, **sections: Any) -> Any:
    raw = small_run(photos, folder).model_dump(mode="json", exclude_unset=True)
    data = {**PHOTO, "root": str(photos), "decoding": {"decoder": "torchvision", "threads": 1}, "shared_decode": shared}
    return validate({**raw, "data": data, **sections})


def test_a_run_that_shares_is_the_run_that_does_not(photos: Path, tmp_path: Path) -> None:
    """Resumed within it, from one epoch of three steps to the next."""
    constant = {"schedule": {"name": "constant"}}
    run_ranks(2, train_here, photo_run(photos, tmp_path / "off", "off", train={"epochs": 2}, **constant))
    run_ranks(2, train_here, photo_run(photos, tmp_path / "on", "on", train={"epochs": 1}, **constant))
    run_ranks(2, train_here, photo_run(photos, tmp_path / "on", "on", train={"epochs": 2}, **constant))
    assert_same_weights(weights(tmp_path / "on"), weights(tmp_path / "off"), 0)


def left_by_another(config: Any) -> float:
    """Rank 1 ends in the middle of an epoch; rank 0 has an error soon, and its pipeline ends."""
    placement = Placement.even(2, 1, 2, dist.get_rank())
    pipeline = ImageFolder(config.data, 3, torch.device("cpu"))
    share_decoding(config, placement, pipeline)
    batches = pipeline.train(0, 0, placement.rows(8))
    next(batches)
    if placement.rank:
        return 0.0
    begin = time.monotonic()
    with pytest.raises(RuntimeError):
        list(batches)
    pipeline.close()
    return time.monotonic() - begin


def test_a_rank_that_is_gone_is_an_error_and_no_wait(photos: Path) -> None:
    data = {**PHOTO, "root": str(photos), "decoding": {"decoder": "torchvision", "threads": 1}}
    assert run_world(2, left_by_another, config_of({"name": "dml"}, 2, data=data))[0] < 20


@pytest.mark.parametrize("world", [2, 6, 64])
def test_shares_of_a_node_are_even_and_whole(world: int) -> None:
    """Each row is decoded by one of those that want it; in even placements all decode as many."""
    for placement in (Placement.even(2, 1, world, 0), Placement.even(1, 1, world, 0)):
        batch = 64 * world
        wanted = {rank: np.arange(batch)[placement.of(rank).rows(batch)] for rank in range(world)}
        found = shares(wanted)
        assert sorted(np.concatenate(list(found.values())).tolist()) == list(range(batch))
        assert all(set(found[rank].tolist()) <= set(wanted[rank].tolist()) for rank in range(world))
        assert {len(rows) for rows in found.values()} == {64}
        others = related(wanted)
        assert {len(ranks) for ranks in others.values()} == {len(placement.groups)}


NODES = [(balanced([3.0, 1.0], 8, 0), 4), (balanced([1.0, 1.0, 2.0], 9, 0), 3), (Placement.even(2, 1, 8, 0), 4)]


@pytest.mark.parametrize("case", range(len(NODES)))
def test_each_row_is_counted_by_one_rank_of_the_world(case: int) -> None:
    """Several nodes may decode a row, where ranks on them see it."""
    placement, per_node = NODES[case]
    world, batch = placement.world, 90
    counted, decodings = np.zeros(batch, int), np.zeros(batch, int)
    for begin in range(0, world, per_node):
        here = range(begin, begin + per_node)
        wanted = {rank: np.arange(batch)[placement.of(rank).rows(batch)] for rank in here}
        for rank, ranks in related(wanted).items():
            decoded = shares({each: wanted[each] for each in ranks})[rank]
            decodings[decoded] += 1
            counted[decoded[counted_of(placement, ranks, wanted, decoded)]] += 1
    assert counted.tolist() == [1] * batch
    assert decodings.max() > 1


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (
            {"views": "per_peer"},
            r"^data\.shared_decode = on: with data\.views = per_peer each peer sees pixels of its own",
        ),
        ({"dataset": "fashion_mnist"}, r"data\.shared_decode: 'on' has no meaning for dataset fashion_mnist"),
    ],
)
def test_what_cannot_be_shared_is_refused(photos: Path, tiny: Path, data: dict[str, Any], message: str) -> None:
    raw = {**PHOTO, "root": str(photos), "shared_decode": "on", **data}
    if "dataset" in data:
        raw = {"dataset": "fashion_mnist", "root": str(tiny), "global_batch": 8, "shared_decode": "on"}
    with pytest.raises(ConfigError, match=message):
        check_run(config_of({"name": "dml"}, 2, data=raw), Launch(0, 0, 1))

"""What decodes for validation is built when it is needed and gone afterwards; what trains stays for the next epoch."""

from __future__ import annotations

import gc
from pathlib import Path

import pytest
import torch

from data_pipelines import DataConfig, open_pipeline
from data_pipelines.decoding.contract import Plan
from data_pipelines.decoding.dali import Graph
from data_pipelines.decoding.with_torchvision import TorchvisionDecoder
from tests.data_pipelines.files import write_photos


def _alive() -> list[Plan]:
    """What the decoders are for that are alive."""
    gc.collect()
    return [each.plan for each in gc.get_objects() if type(each) in (Graph, TorchvisionDecoder)]


@pytest.mark.parametrize("decoder", ["torchvision", "cpu"])
def test_a_decoder_lives_as_long_as_it_is_wanted(tmp_path: Path, decoder: str) -> None:
    if decoder == "cpu":
        pytest.importorskip("nvidia.dali")
    write_photos(tmp_path)
    gc.collect()
    gc.freeze()  # What is there already is neither looked at nor found, which takes long after other tests.
    config = DataConfig(
        dataset="image_folder",
        root=tmp_path,
        global_batch=8,
        held_out=0.3,
        image={"size": 48, "resize": 56, "training_sizes": [[0, 32], [1, 40]]},
        decoding={"decoder": decoder, "threads": 2},
    )
    pipeline = open_pipeline(config, 5, torch.device("cpu"))
    assert _alive() == []
    assert len(list(pipeline.train(0, 0, slice(0, 8)))) > 1
    assert [plan.side for plan in _alive()] == [32]
    for batches in (pipeline.evaluate(0, 1, 5), pipeline.held_out(0, 1, 5)):
        next(batches)
        assert sorted(plan.side for plan in _alive()) == [32, 48]
        assert len(list(batches)) > 0
        assert [plan.side for plan in _alive()] == [32]
    # Images of a size that does not come again; an evaluation within an epoch finds the epoch's decoder beside its own.
    epoch = pipeline.train(1, 0, slice(0, 8))
    next(epoch)
    assert len(list(pipeline.evaluate(0, 1, 5))) > 1
    assert [plan.side for plan in _alive()] == [40]
    assert len(list(epoch)) > 0
    pipeline.close()
    del epoch, batches
    assert _alive() == []
    gc.unfreeze()

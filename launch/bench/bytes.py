"""`python launch/bench bytes`: not timed; what each method sends, from its signals' shapes."""

from __future__ import annotations

from typing import Any

import torch

from data_pipelines import Batch
from engine.cohort.cohort import Cohort
from engine.config.loading import validate
from engine.ranks.exchanging.routes import NUMBERS_OF_A_ROW
from engine.ranks.planning.choosing import plan
from engine.rehearsal import META
from losses import Progress
from losses.capabilities import AllRows
from models.shapes_alone import dry_run


def bytes_a_step(method: str, network: str = "torchvision/resnet50", rows: int = 128, **options: Any) -> int:
    """What one peer sends in one step at ImageNet's shapes, in float32, taken from the signals of a forward pass.

    To be called in a world of one rank.
    """
    num_peers = 3 if method == "okddip" else 2
    config = validate(
        {
            "name": "bytes",
            "device": "cpu",
            "method": {"name": method, **options},
            "peers": [{"network": network, "copies": num_peers}],
            "data": {"dataset": "fashion_mnist_subset", "global_batch": 2},
            "train": {"epochs": 1},
        }
    )
    cohort = Cohort(
        config,
        plan(config, 1, 0),
        META,
        num_classes=1000,
        channels=3,
        image_size=224,
        steps_per_epoch=1000,
    )
    if cohort.method.exchange == "none":
        return 0
    images, targets = torch.zeros(2, 3, 224, 224, device=META), torch.zeros(2, dtype=torch.int64, device=META)
    batch = Batch((images,), targets, torch.arange(2, device=META))
    signals = dry_run(cohort.forward, batch, Progress(0, 1000, 1), 0, [0])[0]
    assert all(len(x) == 2 for x in signals.values())
    numbers = sum(x.numel() for name, x in signals.items() if name not in cohort.private)
    if isinstance(cohort.method, AllRows) and cohort.method.everywhere:
        numbers += 2 * NUMBERS_OF_A_ROW
    return numbers // 2 * rows * 4

"""What the fork server does once for all ranks of all worlds.

A rank imports the module of the function that it calls, and with it pytest; some runs want timm and the compiler.
"""

import gc

import pytest  # noqa: F401
import timm.optim  # noqa: F401
import torch
import torch._dynamo
import torch.distributed as dist
from torch.testing._internal.distributed.fake_pg import FakeStore

import engine.trainer  # noqa: F401
from engine.cohort.cohort import Cohort
from engine.ranks.planning.choosing import plan
from engine.training.step import train_step
from engine.training.timing import Clock
from losses import Progress
from tests.engine.stepping import CLASSES, CPU, IMAGE_SIZE, STEPS_PER_EPOCH, config_of, global_batch


def _step(side: int) -> None:
    config = config_of()
    cohort = Cohort(
        config,
        plan(config, 1, 0),
        CPU,
        num_classes=CLASSES,
        channels=1,
        image_size=side,
        steps_per_epoch=STEPS_PER_EPOCH,
    )
    train_step(cohort, [global_batch(config, 0, size=side)], Progress(0, STEPS_PER_EPOCH, 2), Clock(CPU))


# Kernels are made, and shapes worked out, when they are first wanted: that takes a tenth of a rank's time. No thread
# may come of it, as none would be there in a rank.
torch.set_num_threads(1)
dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=1)
with torch.random.fork_rng(devices=[]):
    _step(IMAGE_SIZE)
    _step(28)  # Fashion-MNIST's
dist.destroy_process_group()

# What is here stays: a rank that looks for garbage shall not touch, and so copy, all of it.
gc.collect()
gc.freeze()

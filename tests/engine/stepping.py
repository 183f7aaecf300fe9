"""Single training steps in a real world, on made-up images: what the tests of the step, the exchange and the contract
share. Everything here runs inside a rank."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from data_pipelines import Batch
from engine.cohort.cohort import Cohort
from engine.config import RunConfig
from engine.config.loading import validate
from engine.ranks.planning.choosing import plan
from engine.ranks.tables import ShardedTable, WholeTable
from engine.training.step import Outcome, train_step
from engine.training.timing import Clock
from losses import METHODS, Method, Progress

CPU = torch.device("cpu")
CLASSES = 10
IMAGE_SIZE = 16
STEPS_PER_EPOCH = 5


def config_of(method: dict[str, Any] | None = None, peers: Any = 2, **sections: Any) -> RunConfig:
    """A run at a constant rate on global batches of 12; `peers` is a number of small ResNets, or their configs."""
    if isinstance(peers, int):
        peers = [{"network": "cifar_resnet8_b", "copies": peers, "options": {"width": 4}}]
    raw: dict[str, Any] = {
        "name": "steps",
        "device": "cpu",
        "method": method or {"name": "dml"},
        "peers": peers,
        "data": {"dataset": "fashion_mnist_subset", "global_batch": 12},
        "train": {"epochs": 2},
        "optimizer": {"lr": 0.05},
        "schedule": {"name": "constant"},
    }
    for name, section in sections.items():
        raw[name] = raw.get(name, {}) | section
    return validate(raw)


def cohort_of(
    config: RunConfig, channels: int = 1, method: type[Method] | None = None, per_node: int | None = None
) -> Cohort:
    """This rank's part of the cohort, in the world that is running; `method` is one of a test's own, known from then on
    to this rank, which ends with the world. `per_node` ranks are taken for a node."""
    if method is not None:
        METHODS[method.name] = method
    placement = plan(config, dist.get_world_size(), dist.get_rank(), per_node)
    cohort = Cohort(
        config,
        placement,
        CPU,
        num_classes=CLASSES,
        channels=channels,
        image_size=IMAGE_SIZE,
        steps_per_epoch=STEPS_PER_EPOCH,
    )
    cohort.prepare(torch.cat([global_batch(config, step, channels).targets for step in range(2 * STEPS_PER_EPOCH)]))
    return cohort


def cohort_in_double(config: RunConfig, per_node: int | None = None) -> Cohort:
    """As `cohort_of`, computing and exchanging in float64 throughout. This rank does so until the end of its world."""
    torch.set_default_dtype(torch.float64)
    torch.Tensor.float = torch.Tensor.double  # type: ignore[method-assign]
    cohort = cohort_of(config, per_node=per_node)
    cohort.exchange._wire = torch.float64
    for optimizer in cohort.optimizers():  # the fused kernel takes its flag in float32 only
        optimizer._step_supports_amp_scaling = False  # type: ignore[attr-defined]
        optimizer.param_groups[0]["fused"] = False
    for table in cohort.method.modules():
        if isinstance(table, WholeTable | ShardedTable):
            table.rows = table.rows.double()
    return cohort


def global_batch(config: RunConfig, step: int, channels: int = 1, size: int = IMAGE_SIZE) -> Batch:
    """The same on every rank: noise around a pattern of the class, so that there is something to learn. The images of
    two steps are different ones."""
    n, generator = config.data.global_batch, torch.Generator().manual_seed(1000 + step)
    targets = torch.randint(CLASSES, (n,), generator=generator)
    patterns = torch.randn(CLASSES, channels, size, size, generator=torch.Generator().manual_seed(7))
    images = patterns[targets] + 0.5 * torch.randn(n, channels, size, size, generator=generator)
    ids = torch.arange(step * n, (step + 1) * n)
    return Batch((images.contiguous(memory_format=torch.channels_last),), targets, ids)


Spoil = Callable[[int, int, Tensor], None]
"""(step, rank, this rank's images): may change the images."""


def batches(
    cohort: Cohort, steps: Sequence[int], channels: int = 1, spoil: Spoil | None = None
) -> Iterator[tuple[int, list[Batch]]]:
    """(step, micro-batches of this rank's rows) for each of the steps."""
    for step in steps:
        data, parts = cohort.config.data, cohort.config.train.accumulation
        rows = cohort.placement.rows(data.global_batch, parts, data.tuple_size)
        whole = global_batch(cohort.config, step, channels)
        # The views differ by a shift of their brightness, as little as is enough to tell them apart.
        views = tuple(whole.images[rows] + 0.1 * view for view in cohort.views)
        mine = Batch(views, whole.targets[rows], whole.ids[rows])
        if spoil:
            spoil(step, dist.get_rank(), mine.images)
        yield step, mine.split([len(share.rows) for share in cohort.shares])


def do_steps(cohort: Cohort, steps: Sequence[int], channels: int = 1, spoil: Spoil | None = None) -> list[Any]:
    """Trains; gives (terms and norms as numbers, skipped) of each step."""
    done = []
    for step, pieces in batches(cohort, steps, channels, spoil):
        outcome = train_step(cohort, pieces, Progress(step, STEPS_PER_EPOCH, 2), Clock(CPU))
        done.append((numbers_of(outcome), int(outcome.skipped)))
    return done


def numbers_of(outcome: Outcome) -> dict[tuple[int | None, str], float]:
    """The terms, and (k, "grad_norm") of each resident."""
    norms = {(k, "grad_norm"): norm.item() for k, norm in outcome.norms.items()}
    return {key: term.item() for key, term in outcome.terms.items()} | norms


def state(cohort: Cohort) -> dict[str, Tensor]:
    """Copies of every tensor of this rank's peers, as `peer/name`, and of the method, as `method/name`."""
    tensors = {f"{k}/{name}": x for k, r in cohort.residents.items() for name, x in r.peer.state_dict().items()}
    tensors |= {f"method/{name}": x for name, x in cohort.method.state_dict().items()}
    return {name: x.detach().clone() for name, x in tensors.items()}


def optimizer_state(cohort: Cohort) -> dict[str, Tensor]:
    """Copies of every tensor that the optimisers remember."""
    return {
        f"{i}/{j}/{name}": x.detach().clone()
        for i, optimizer in enumerate(cohort.optimizers())
        for j, remembered in optimizer.state_dict()["state"].items()
        for name, x in remembered.items()
        if isinstance(x, Tensor)
    }


def train_states(config: RunConfig, steps: int, method: type[Method] | None = None) -> dict[str, Tensor]:
    """This rank's state after so many steps."""
    cohort = cohort_of(config, method=method)
    do_steps(cohort, range(steps))
    return state(cohort)


def joined(ranks: Sequence[dict[str, Tensor]]) -> dict[str, Tensor]:
    """The states of all ranks as one; what several ranks hold must be the same bits but for BatchNorm statistics."""
    whole: dict[str, Tensor] = {}
    for held in ranks:
        for name, x in held.items():
            if "running_" not in name and name in whole:
                assert torch.equal(whole[name], x), f"{name} differs between ranks"
            whole.setdefault(name, x)
    return whole

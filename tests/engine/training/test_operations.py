"""What a step asks of the host: every operation that torch dispatches is counted, against a bare loop of the same
forward passes, losses, backward passes and updates. On a GPU small networks are bound by this number."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode

import models
from engine.training.step import train_step
from engine.training.timing import Clock
from losses import Progress
from tests.engine.stepping import CLASSES, CPU, cohort_of, config_of, global_batch
from tests.marks import slow
from tests.worlds import run_world

NETWORK = {"network": "cifar_resnet32_a"}
AT_MOST = 1.05


class Operations(TorchDispatchMode):
    """Counts them by name."""

    def __init__(self) -> None:
        super().__init__()
        self.counts: Counter[str] = Counter()

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.counts[str(function)] += 1
        return function(*args, **(kwargs or {}))


def _counted(step: Callable[[], object]) -> Counter[str]:
    for _ in range(2):
        step()  # what is made once, at the first steps, is not counted
    with Operations() as seen:
        step()
    return seen.counts


def _engine(method: str, peers: int) -> Callable[[], object]:
    config = config_of({"name": method}, [{**NETWORK, "copies": peers}])
    cohort = cohort_of(config)
    batch, clock = global_batch(config, 0), Clock(CPU)
    return lambda: train_step(cohort, [batch], Progress(0, 5, 2), clock)


def _bare(method: str, num_peers: int) -> Callable[[], object]:
    """As one would write it: K forward passes, the terms of the papers, one backward pass, K foreach updates."""
    batch = global_batch(config_of(), 0)
    peers = [models.create(NETWORK["network"], CLASSES, 1) for _ in range(num_peers)]
    peers = [peer.to(memory_format=torch.channels_last) for peer in peers]  # type: ignore[call-overload]
    optimizers = [
        torch.optim.SGD(p.parameters(), lr=0.05, momentum=0.9, weight_decay=5e-4, nesterov=True, foreach=True)
        for p in peers
    ]

    def step() -> None:
        logits = [peer(batch.images) for peer in peers]
        for optimizer in optimizers:
            optimizer.zero_grad(set_to_none=True)
        loss = torch.stack([F.cross_entropy(z, batch.targets) for z in logits]).sum()
        if method == "dml":
            log_p = [z.log_softmax(1) for z in logits]
            p = [x.detach().exp() for x in log_p]
            for k, x in enumerate(log_p):
                others = [q for j, q in enumerate(p) if j != k]
                q = others[0] if num_peers == 2 else torch.stack(others).mean(0)
                loss = loss + F.kl_div(x, q, reduction="batchmean")
        loss.backward()
        for optimizer in optimizers:
            optimizer.step()

    return step


def _both(method: str, peers: int) -> tuple[dict[str, int], dict[str, int]]:
    return dict(_counted(_engine(method, peers))), dict(_counted(_bare(method, peers)))


@pytest.mark.parametrize("peers", [2, 8])
@pytest.mark.parametrize("method", [slow("independent"), "dml"])
def test_a_step_dispatches_hardly_more_operations_than_a_bare_loop(method: str, peers: int) -> None:
    engine, bare = run_world(1, _both, method, peers)[0]
    total, least = sum(engine.values()), sum(bare.values())
    surplus = (Counter(engine) - Counter(bare)).most_common(12)
    assert total <= AT_MOST * least, f"{total} against {least}: {surplus}"

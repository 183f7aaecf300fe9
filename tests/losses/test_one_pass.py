"""What an objective does with the logits of K peers, counted: one log-softmax of each at each temperature that the
equations have, and memory in proportion to K."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from launch.bench.host import bytes_made
from losses import METHODS, Progress
from tests.losses.peers import peers as alike

N, C, D = 4, 501, 8
"""C is the width of nothing else."""
STAGES = [(3, 8), (4, 4), (5, 2), (6, 1)]
PROGRESS = Progress(step=103, steps_per_epoch=1, epochs=300)

LOG_SOFTMAXES: dict[str, tuple[dict[str, Any], float, int]] = {
    "independent": ({}, 1, 0),
    "dml": ({"name": "dml"}, 1, 0),
    "dml, T = 3": ({"name": "dml", "temperature": 3.0}, 2, 0),
    "dml, weights": ({"name": "dml"}, 1, 0),
    "dml, ensemble": ({"name": "dml", "combine": "ensemble"}, 1, 0),
    "cl_ilr": ({"name": "cl_ilr"}, 3, 0),
    "cl_ilr, attached": ({"name": "cl_ilr", "teacher": "attached"}, 3, 0),
    "one": ({"name": "one"}, 2, 2),
    "ffl": ({"name": "ffl"}, 2, 3),
    # Peers are stacked; K cross-entropies and, whatever K is, peers, mixtures, leader and mean.
    "okddip": ({"name": "okddip", "form": "network"}, 1, 4),
    "okddip, probabilities": ({"name": "okddip", "form": "network", "mix": "probabilities"}, 1, 2),
    "dcm": ({"name": "dcm"}, 3, 0),
    "codistillation": ({"name": "codistillation"}, 1, 0),
    "kdcl": ({"name": "kdcl"}, 2, 1),
    "kdcl, T = 1": ({"name": "kdcl", "temperature": 1.0}, 1, 1),
    "pcl": ({"name": "pcl"}, 3, 2),
    "mcl": ({"name": "mcl", "negatives": "batch", "logit_distill": "all"}, 2, 1),
    # S = 2 exits and the aggregate, whose targets are aggregates at T, and the last exit at T.
    "lmcl": ({"name": "lmcl", "negatives": "batch"}, 2 + 1 + 1 + 1, 0),
}
"""A method -> (section, log-softmaxes a peer, and others)."""

PAIRS = "mcl", "lmcl"
"""Whose contrast is between every two peers: there is a matrix of products for each pair."""


class LogSoftmaxes(TorchDispatchMode):
    """Counts those over classes."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if function in (torch.ops.aten._log_softmax.default, torch.ops.aten._softmax.default):
            self.count += args[0].shape[-1] == C
        return function(*args, **(kwargs or {}))


def observed(name: str, num_peers: int) -> tuple[int, int]:
    """Log-softmaxes, and bytes made, forward and backward."""
    section = LOG_SOFTMAXES[name][0] or {"name": "independent"}
    cls = METHODS[section["name"]]
    if name == "dml, weights":
        section = {**section, "weights": [[float(j != k) for j in range(num_peers)] for k in range(num_peers)]}
    torch.manual_seed(0)
    infos = [
        replace(info, auxiliary=lambda *_: _Passing(), network=lambda: nn.Linear(1, 1))
        for info in alike(num_peers, C, D, STAGES)
    ]
    method = cls(cls.Options(**section), infos)
    trunk = torch.randn(N, STAGES[2][0], 2, 2)
    shapes = {"features": (D,), "map": (6, 1, 1), "teacher": (C,), "exits": (2, C), "aggregate": (C,)}
    shapes |= {"embeddings": (2 if section["name"] == "lmcl" else 1, 16), "match": (2, 16)}
    leaves = [
        {"logits": torch.randn(N, C), "stage2": torch.randn(N, C), "stage3": torch.randn(N, C)}
        | {name: torch.randn(N, *shape) for name, shape in shapes.items()}
        for _ in infos
    ]

    def forward_and_backward() -> None:
        signals = []
        for info, leaf in zip(infos, leaves, strict=True):
            live = {name: x.requires_grad_() for name, x in leaf.items()}
            shown = {**live, "trunk": trunk, "stale": torch.full((N, C), 1 / C)}
            signals.append(shown | (method.head(info)(live) if section["name"] == "dcm" else {}))
        terms = method(range(num_peers), signals, torch.arange(N) % 2, PROGRESS)
        torch.stack(list(terms.values())).sum().backward()

    with LogSoftmaxes() as seen:
        made = bytes_made(forward_and_backward)
    return seen.count, made


class _Passing(nn.Module):
    def forward(self, maps: Tensor) -> dict[str, Tensor]:
        return {"logits": maps}


@pytest.mark.parametrize("name", LOG_SOFTMAXES)
def test_logits_are_read_once_and_memory_is_in_proportion_to_the_peers(name: str) -> None:
    _, of_peer, once = LOG_SOFTMAXES[name]
    made = {}
    for num_peers in (4, 8, 16):
        count, made[num_peers] = observed(name, num_peers)
        assert count == of_peer * num_peers + once
    if name not in PAIRS:
        assert made[16] - made[8] <= 1.05 * 2 * (made[8] - made[4])

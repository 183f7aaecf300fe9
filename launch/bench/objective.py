"""What the objective alone costs, at ImageNet's shapes: `launch/bench objective`."""

from __future__ import annotations

import statistics
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from launch.bench.host import bytes_made, operations
from launch.bench.turns import in_turn, ratio
from losses import METHODS, PeerInfo, Progress

ROWS, CLASSES = 256, 1000
PEERS = 2, 4, 8
FORMS: dict[str, dict[str, Any]] = {
    "dml": {"name": "dml"},
    "dml, T = 3": {"name": "dml", "temperature": 3.0},
    "kdcl": {"name": "kdcl"},
    "cl_ilr": {"name": "cl_ilr"},
}
"""Methods whose objective looks at logits alone."""


def objective(rounds: int, steps: int, device: torch.device) -> None:
    """Objective and gradient by the logits, for several numbers of peers, against KL on every pair as the papers'
    repositories have it; its operations, and the bytes that it makes beside the logits."""
    print(f"objective: {ROWS} rows, {CLASSES} classes, {device.type}, torch {torch.__version__}")
    print(f"  {'':12} {'peers':>5} {'ms':>8} {'operations':>10} {'MB made':>8} {'over pair by pair':>18}")
    for name, section in FORMS.items():
        for peers in PEERS:
            ours, pairs = _ours(section, peers, device), _pair_by_pair(peers, device)
            times = in_turn({"ours": ours, "pairs": pairs}, rounds, steps, device)
            low, middle, high = ratio(times, "ours", "pairs")
            print(
                f"  {name:12} {peers:5} {1000 * statistics.median(times['ours']):8.2f} {operations(ours):10} "
                f"{bytes_made(ours) / 1e6:8.1f} {middle:6.3f} ({low:.3f} to {high:.3f})"
            )


def _logits(peers: int, device: torch.device) -> tuple[list[Tensor], Tensor]:
    generator = torch.Generator().manual_seed(0)
    logits = [torch.randn(ROWS, CLASSES, generator=generator).to(device).requires_grad_() for _ in range(peers)]
    return logits, torch.randint(CLASSES, (ROWS,), generator=generator).to(device)


def _ours(section: dict[str, Any], peers: int, device: torch.device) -> Callable[[], object]:
    logits, targets = _logits(peers, device)
    cls = METHODS[section["name"]]
    infos = [PeerInfo(k, CLASSES, 0, (), *[None] * 3) for k in range(peers)]  # type: ignore[arg-type]
    method = cls(cls.Options(**section), infos).to(device)
    signals = [{"logits": z} for z in logits]

    def step() -> object:
        terms = method(range(peers), signals, targets, Progress(7, 1000, 1))
        return torch.autograd.grad(torch.stack(list(terms.values())).sum(), logits)

    return step


def _pair_by_pair(peers: int, device: torch.device) -> Callable[[], object]:
    logits, targets = _logits(peers, device)

    def step() -> object:
        loss = torch.zeros((), device=device)
        for k, z in enumerate(logits):
            loss = loss + F.cross_entropy(z, targets)
            for j, other in enumerate(logits):
                if j != k:
                    kl = F.kl_div(F.log_softmax(z, 1), F.softmax(other.detach(), 1), reduction="batchmean")
                    loss = loss + kl / (peers - 1)
        return torch.autograd.grad(loss, logits)

    return step

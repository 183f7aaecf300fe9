"""How fast ranks talk to each other: NCCL between GPUs, gloo between CPUs."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator

import torch
import torch.distributed as dist

_TIMES = 10
_NUMBERS = 2**24
"""Of 4 bytes: about the gradients of a ResNet-50."""


def exchange(device: torch.device) -> Iterator[str]:
    """Lines about the world that is running; every rank must ask for all of them.

    An all-reduce of W ranks sends and receives 2 (W - 1) / W of its bytes on each, which is what the rate counts.
    """
    ranks, backend = dist.get_world_size(), dist.get_backend()
    few, many = torch.ones(1, device=device), torch.ones(_NUMBERS, device=device)
    latency = _slowest(lambda: dist.all_reduce(few), device)
    if ranks == 1:
        yield f"exchange: {backend} starts; one rank has nobody to talk to, torchrun starts several"
        return
    seconds = _slowest(lambda: dist.all_reduce(many), device)
    sent = 2 * (ranks - 1) / ranks * many.nbytes
    yield (
        f"exchange between {ranks} ranks, {backend}: {sent / seconds / 1e9:.2f} GB/s of a rank in all-reduces of "
        f"{many.nbytes / 1e6:.0f} MB, {latency * 1e6:,.0f} us for a single number"
    )


def _slowest(collective: Callable[[], object], device: torch.device) -> float:
    """Seconds of one, of the rank that took longest. The first, which makes connections, does not count."""
    collective()
    _wait(device)
    dist.barrier()
    begin = time.perf_counter()
    for _ in range(_TIMES):
        collective()
    _wait(device)
    seconds = torch.tensor((time.perf_counter() - begin) / _TIMES, dtype=torch.float64, device=device)
    dist.all_reduce(seconds, dist.ReduceOp.MAX)
    return seconds.item()


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)

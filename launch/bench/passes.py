"""Times the passes of single peers on the device at hand."""

from __future__ import annotations

import functools
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import replace

import torch
import torch.nn.functional as F
from torch import nn

import models
from engine.cohort.layout import channels_first, placed
from engine.cohort.precision import AUTOCAST, autocast, set_precision
from engine.config import PeerConfig, RunConfig
from engine.ranks.collectives import Launch, choose_device
from engine.ranks.planning.planner import Load, PeerLoad

REPEATS = 5


def timed_peers(config: RunConfig, load: Load, classes: int, gpus: int) -> Sequence[PeerLoad]:
    """The peers of a load with times of this machine, at two numbers of rows, and on a line through them elsewhere."""
    device = choose_device(config.device, Launch(0, 0, 1))
    set_precision(config, device)
    most = max(2, load.batch // load.parts // max(1, gpus // len(load.peers)))
    least = max(2, most // 4)
    found: dict[tuple[str, str, bool], Callable[[int], tuple[float, float]]] = {}
    peers = []
    for known, (_, peer) in zip(load.peers, config.cohort, strict=True):
        kind = (peer.network, repr(peer.options), peer.learns)
        if kind not in found:
            low, high = (_timed(config, peer, classes, rows, device) for rows in (least, most))
            found[kind] = _line(low, high, least, most)
        peers.append(replace(known, seconds=functools.cache(found[kind])))
    return peers


def _line(
    low: tuple[float, float], high: tuple[float, float], least: int, most: int
) -> Callable[[int], tuple[float, float]]:
    def at(rows: int) -> tuple[float, float]:
        part = (rows - least) / (most - least) if most > least else rows / least - 1
        forward, back = (max(0.0, a + part * ((b - a) if most > least else a)) for a, b in zip(low, high, strict=True))
        return forward, back

    return at


def _timed(config: RunConfig, peer: PeerConfig, classes: int, rows: int, device: torch.device) -> tuple[float, float]:
    """Medians of the seconds of a pass forward and of one backward with an update."""
    side, channels = config.data.side, config.data.channels
    first = channels_first(config, peer, device, rows, channels, side)
    network = models.create(peer.network, classes, channels, **peer.options)
    network = placed(network, device, last=config.precision.channels_last != "off", first=first)
    network.train(peer.learns).requires_grad_(peer.learns)
    if config.precision.compile:
        network.compile()
    optimizer = torch.optim.SGD(network.parameters(), 1e-6, momentum=0.9, foreach=True) if peer.learns else None
    images = torch.rand(rows, channels, side, side, device=device).contiguous(memory_format=torch.channels_last)
    targets = torch.zeros(rows, dtype=torch.int64, device=device)
    times = [_pass(config, network, optimizer, images, targets, device) for _ in range(REPEATS + 2)][2:]
    there, back = (statistics.median(each[i] for each in times) for i in range(2))
    return there, back


def _pass(
    config: RunConfig,
    network: nn.Module,
    optimizer: torch.optim.Optimizer | None,
    images: torch.Tensor,
    targets: torch.Tensor,
    device: torch.device,
) -> tuple[float, float]:
    def now() -> float:
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        # What else the machine does takes nothing from a single thread's time.
        return time.process_time() if device.type == "cpu" and torch.get_num_threads() == 1 else time.perf_counter()

    begin = now()
    with autocast(device, AUTOCAST[config.precision.amp]), torch.set_grad_enabled(optimizer is not None):
        loss = F.cross_entropy(network(images).float(), targets)
    middle = now()
    if optimizer is not None:
        loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
    return middle - begin, now() - middle

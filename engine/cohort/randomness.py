"""Streams of random numbers that depend on the run, the peer and the step, never on the rank or on what came before."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import numpy as np
import torch


def seed_for(*words: int) -> int:
    """A 63-bit seed from a sequence of non-negative integers."""
    return int(np.random.SeedSequence(words).generate_state(1, np.uint64)[0] >> 1)


@contextlib.contextmanager
def initialisation(seed: int, peer: int) -> Iterator[None]:
    """Weights drawn inside depend on the run's seed and the peer alone, wherever and whenever the peer is built."""
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed_for(seed, 0, peer))
        yield


def before_forward(seed: int, peer: int, step: int, micro: int, replica: int, device: torch.device) -> None:
    """Dropout and stochastic depth of one forward pass. Set anew each time, so that no state has to be saved, a resumed
    run draws the same masks, and a peer draws the same masks wherever it lives."""
    value = seed_for(seed, 1, peer, step, micro, replica)
    if device.type == "cuda":
        torch.cuda.default_generators[device.index].manual_seed(value)
    else:
        torch.default_generator.manual_seed(value)

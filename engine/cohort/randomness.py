"""Streams of random numbers that depend on the run, the peer and the step, never on the rank or on what came before."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch


def seed_for(*words: int) -> int:
    """A 63-bit seed from a sequence of non-negative integers."""
    return int(np.random.SeedSequence(words).generate_state(1, np.uint64)[0]) >> 1


@dataclass(frozen=True)
class Streams:
    """The random numbers of a run of K peers, each kind from a stream of its own.

    The numbers of the streams are frozen: a run that goes on must draw what it would have drawn.

    ============== ======================== =========================================
    of             initial weights          what a forward pass draws (dropout)
    ============== ======================== =========================================
    peer k         k                        k
    the method     K                        K
    a trunk        that of peer 0           K + 1; K + 1 + k where views are peer k's
    peer k's head  K + 1 + k                with its peer
    the same, in   (2 + r) K + 1 + k
    replica r > 0
    a teacher      its peer's               2 K + 1 + k
    ============== ======================== =========================================

    Attributes:
        seed: of the run.
        num_peers: K.
        replica: this rank's; replicas drop out different units, and begin with the same weights.
        device: where forward passes draw.
    """

    seed: int
    num_peers: int
    replica: int
    device: torch.device

    def initial_network(self, k: int) -> contextlib.AbstractContextManager[None]:
        """For the weights of peer k's network, of a copy of it, and of a trunk that was cut off it."""
        return self._initialisation(k)

    def initial_method(self) -> contextlib.AbstractContextManager[None]:
        """For the modules that all peers share."""
        return self._initialisation(self.num_peers)

    def initial_head(self, k: int, replica: int = 0) -> contextlib.AbstractContextManager[None]:
        """For peer k's head; for those parts of it that replicas begin with differently, those of a replica."""
        return self._initialisation(((2 + replica) if replica else 1) * self.num_peers + 1 + k)

    def before_peer(self, k: int, step: int, micro: int) -> None:
        """Before a forward pass of peer k, in a micro-batch of a step."""
        self._before_forward(k, step, micro)

    def before_objective(self, step: int, micro: int) -> None:
        """Before the objective, in which modules that all peers share may draw."""
        self._before_forward(self.num_peers, step, micro)

    def before_trunk(self, step: int, micro: int, k: int, *, per_peer: bool) -> None:
        """Before a forward pass of the shared trunk, on the view of peer k, or on the one that all peers see."""
        self._before_forward(self.num_peers + 1 + (k if per_peer else 0), step, micro)

    def before_teacher(self, k: int, step: int, micro: int) -> None:
        """Before a forward pass of the teacher that follows peer k."""
        self._before_forward(2 * self.num_peers + 1 + k, step, micro)

    @contextlib.contextmanager
    def _initialisation(self, stream: int) -> Iterator[None]:
        # Wherever and whenever it is built, what is drawn inside depends on the run's seed and the stream alone.
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(seed_for(self.seed, 0, stream))
            yield

    def _before_forward(self, stream: int, step: int, micro: int) -> None:
        # Set anew each time, so that no state has to be saved, and a resumed run draws the same masks.
        value = seed_for(self.seed, 1, stream, step, micro, self.replica)
        if self.device.type == "cuda":
            torch.cuda.default_generators[self.device.index].manual_seed(value)
        else:
            torch.default_generator.manual_seed(value)

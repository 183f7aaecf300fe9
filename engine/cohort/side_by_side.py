"""Peers computed at the same time on a CPU, each by one thread, in place of one after another by all threads."""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor

import torch
from torch import Tensor

from engine.cohort import one_by_one
from engine.config import ConfigError, RunConfig
from engine.ranks.placement import Placement
from losses import Signals


def hindrance(config: RunConfig, placement: Placement, device: torch.device) -> str | None:
    """Why peers of this rank cannot be computed at the same time; None where they can, by all that a config says."""
    if device.type != "cpu":
        return f"a {device.type} device has queues of its own"
    if placement.world > 1:
        return f"each of several ranks has its cores already, found {placement.world} ranks"
    if config.train.batch_peers != "off":
        return f"train.batch_peers = {config.train.batch_peers} computes peers as one"
    if len(placement.residents) < 2:
        return "there is one peer"
    return one_by_one.reason(config)


class SideBySide:
    """Threads that have one core each.

    A kernel of a small network is over before two cores have shared it out, and waits for the slower of them each time;
    peers need not wait for each other but where they exchange. Signals are cut off the peers' graphs, so that the
    backward pass of the objective ends at them, and goes on within each peer in a thread.

    Args:
        threads: how many, at least two.
    """

    def __init__(self, threads: int) -> None:
        here, ready = torch.get_num_threads(), threading.Barrier(threads + 1)
        self._pool = ThreadPoolExecutor(threads, "peer", _one_core, (ready,))
        for _ in range(threads):
            self._pool.submit(int)
        ready.wait()
        torch.set_num_threads(here)  # what the others have set holds for threads that are still to come, too
        self._cut: list[list[tuple[Tensor, Tensor]]] = []
        self._tried = False

    @classmethod
    def of(cls, config: RunConfig, residents: int, device: torch.device) -> SideBySide | None:
        """For so many peers on a rank; None where a config wants them one after another."""
        threads = min(config.train.peer_threads, residents)
        return cls(threads) if threads > 1 and device.type == "cpu" else None

    def __call__(
        self,
        peers: Sequence[int],
        forward: Callable[[Sequence[int]], Mapping[int, Signals]],
        seed: Callable[[int], None],
    ) -> dict[int, Signals]:
        """The live signals of all peers.

        Args:
            peers: who.
            forward: gives those of some peers.
            seed: what `forward` begins with for a peer: the random stream of the process becomes that peer's.

        Raises:
            ConfigError: a network draws random numbers, which would be of one stream for all threads.
        """
        if self._tried:
            graph = torch.is_grad_enabled()

            def show(k: int) -> Signals:
                with torch.set_grad_enabled(graph):
                    return forward([k])[k]

            found = dict(zip(peers, self._pool.map(show, peers), strict=True))
        else:
            found = {k: _without_draws(k, forward, seed) for k in peers}
            self._tried = True
        return {k: self._apart(own) for k, own in found.items()}

    def _apart(self, own: Signals) -> Signals:
        shown = {name: x.detach().requires_grad_() if x.requires_grad else x for name, x in own.items()}
        self._cut.append([(x, shown[name]) for name, x in own.items() if x.requires_grad])
        return shown

    def backward(self) -> None:
        """Goes on from the gradients of the signals, within each peer."""
        list(self._pool.map(_go_on, self._cut))
        self._cut.clear()


def _one_core(ready: threading.Barrier) -> None:
    torch.set_num_threads(1)
    torch.get_num_threads()  # each thread takes the number when it first asks for it
    ready.wait()


def _without_draws(
    k: int, forward: Callable[[Sequence[int]], Mapping[int, Signals]], seed: Callable[[int], None]
) -> Signals:
    shown = forward([k])[k]
    after = torch.get_rng_state()
    seed(k)
    if not torch.equal(after, torch.get_rng_state()):
        raise ConfigError(
            "train.peer_threads: a network draws random numbers, such as dropout, from what would be one stream for "
            "all threads; expected 1"
        )
    return shown


def _go_on(cut: Sequence[tuple[Tensor, Tensor]]) -> None:
    reached = [(x, leaf.grad) for x, leaf in cut if leaf.grad is not None]
    if reached:
        torch.autograd.backward([x for x, _ in reached], [gradient for _, gradient in reached])

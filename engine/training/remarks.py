"""What a person would want to know of a run before it has cost anything, though it can be run."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Sequence

import torch.distributed as dist

from engine.cohort.cohort import Cohort
from engine.cohort.frozen import digest_of
from engine.config import PeerConfig, RunConfig


def remarks(config: RunConfig, steps_per_epoch: int, images: int) -> Iterator[str]:
    """What the numbers of steps alone show.

    Args:
        steps_per_epoch: whole batches of an epoch.
        images: that are trained on.
    """
    batch, steps = config.data.global_batch, config.train.steps(steps_per_epoch)
    left = images - steps_per_epoch * batch
    if config.data.sampler == "shuffle" and (steps_per_epoch == 1 or left > images / 10):
        few = "one step" if steps_per_epoch == 1 else f"{steps_per_epoch} steps"
        yield (
            f"data.global_batch = {batch}: {few} an epoch, and {left:,} of {images:,} images are not shown in it; a "
            f"smaller batch shows more, {max(1, images // 10):,} at most for 10 steps"
        )
    decay = config.train.ema_decay
    if not decay:
        return
    memory = 1 / (1 - decay)
    if config.train.ema_warmup and steps < memory:
        yield (
            f"train.ema_decay = {decay:g}: the average is one over {memory:,.0f} updates and the run has {steps:,}; "
            f"its warm-up makes it one over the last {max(1, round((1 + steps) ** (2 / 3))):,} or so"
        )
    elif not config.train.ema_warmup and decay**steps > 0.01:
        yield (
            f"train.ema_decay = {decay:g}: the average is one over {memory:,.0f} updates and the run has {steps:,}, "
            f"after which it is still the initial weights by {100 * decay**steps:.0f} %; take a smaller one, or "
            "train.ema_warmup = true"
        )


def twins(cohort: Cohort) -> Iterator[str]:
    """Peers that start from the very same weights and see the same images: they have nothing to teach each other.

    All ranks call this, before the first step.
    """
    starts: dict[str, list[str]] = defaultdict(list)
    for name, peer in cohort.config.trained:
        starts[_kind(peer)].append(name)
    suspects = {name for same in starts.values() if len(same) > 1 for name in same}
    pretrained = {name for name, peer in cohort.config.trained if peer.pretrained}
    if cohort.config.data.views != "shared" or not suspects & pretrained:
        return
    kinds = {name: _kind(peer) for name, peer in cohort.config.trained}
    mine = {
        r.name: digest_of(r.whole) + kinds[r.name] for r in cohort.residents.values() if r.name in suspects & pretrained
    }
    told: list[dict[str, str]] = [{}] * cohort.placement.world
    dist.all_gather_object(told, mine)
    found: dict[str, list[str]] = defaultdict(list)
    for name in (name for name, _ in cohort.config.trained):
        for digest in {digests[name] for digests in told if name in digests}:
            found[digest].append(name)
    yield from (_twins(names) for names in found.values() if len(names) > 1)


def _kind(peer: PeerConfig) -> str:
    return f"{peer.network} {peer.options} {peer.pretrained} {peer.optimizer} {peer.frozen}"


def _twins(names: Sequence[str]) -> str:
    return (
        f"peers {', '.join(names)} start from the same weights, to the last, and see the same images: without dropout "
        "they stay equal and teach each other nothing; let them differ, by peers.N.network, peers.N.pretrained or "
        "data.views = per_peer"
    )

"""Chooses the placement that a config asks for."""

from __future__ import annotations

import itertools
import os
from collections.abc import Iterator, Sequence
from dataclasses import replace

from engine.config import ConfigError, RunConfig
from engine.ranks.placement import Group, Order, Placement, arranged
from engine.ranks.planning.costs import costs_of
from engine.ranks.planning.hardware import GPUS
from engine.ranks.planning.planner import Cluster, Load, choose, load_of, predict

AUTO = Cluster(GPUS["h100"], 8)
"""What `placement.kind: auto` is reckoned for."""


def plan(config: RunConfig, world: int, rank: int, per_node: int | None = None) -> Placement:
    """Chooses the placement that the config asks for on `world` ranks.

    Args:
        per_node: ranks of a node, the same on all ranks; None where that does not matter.

    Raises:
        ConfigError: where peers cannot be dealt to the ranks, or the global batch has too few rows for them, or a job
            of one peer has not been told which.
    """
    chosen = automatic(config, world) if config.placement.kind == "auto" else None
    placement = chosen[0].of(rank) if chosen else _dealt(config, world, rank, per_node)
    batch, parts, unit = config.data.global_batch, config.train.accumulation, config.data.tuple_size
    if not placement.least_rows(batch, parts, unit):
        most = max(len(group.ranks) for group in placement.groups)
        kin = "that are mixed" if config.data.augmentation.mixing.on else "of a class"
        rows = f"a whole tuple of {unit} images {kin}" if unit > 1 else "a row"
        raise ConfigError(
            f"data.global_batch = {batch}: {most} replicas x {parts} micro-batches do not get {rows} each; expected at "
            f"least {most * parts * unit}"
        )
    return replace(placement, per_node=per_node)


def plan_scoring(config: RunConfig, world: int, rank: int) -> Placement:
    """The placement for scoring, to which it does not matter how large the batches of training are.

    Raises:
        ConfigError: where peers cannot be dealt to the ranks.
    """
    given = config.placement.ranks
    if given is not None and sum(given.values()) != world:  # A run may be scored on fewer ranks, or one.
        free = config.placement.model_copy(update={"ranks": None})
        config = config.model_copy(update={"placement": free})
    return _dealt(config, world, rank, None)


def balanced(
    costs: Sequence[float],
    world: int,
    rank: int,
    counts: Sequence[int] | None = None,
    order: Order = "contiguous",
    per_node: int | None = None,
) -> Placement:
    """Ranks for each peer in proportion to its cost; where there are fewer ranks than peers, peers for each rank.

    Args:
        costs: of a step of each of the K peers, in any unit.
        counts: ranks of each peer, where they are given.
        order: see `arranged`.
        per_node: see `arranged`.
    """
    held: Sequence[Sequence[int]] = [(k,) for k in range(len(costs))]
    if counts is None and world < len(costs):
        held, counts = peers_of_ranks(costs, world), [1] * world
    ranks = arranged(counts or ranks_of_peers(costs, world), order, per_node)
    return Placement(len(costs), tuple(Group(*each) for each in zip(held, ranks, strict=True)), rank, order=order)


def ranks_of_peers(costs: Sequence[float], world: int) -> list[int]:
    """How many of at least K ranks each peer gets so that the slowest takes as little time as it can: one rank after
    another goes to the peer with the most work a rank."""
    counts = [1] * len(costs)
    for _ in range(world - len(costs)):
        counts[max(range(len(costs)), key=lambda k: (costs[k] / counts[k], -k))] += 1
    return counts


def peers_of_ranks(costs: Sequence[float], world: int) -> Sequence[Sequence[int]]:
    """Which peers live on each of fewer than K ranks: the most costly first, each on the rank with the least work."""
    held: list[list[int]] = [[] for _ in range(world)]
    for k in sorted(range(len(costs)), key=lambda k: (-costs[k], k)):
        min(held, key=lambda peers: (sum(costs[j] for j in peers), len(peers))).append(k)
    return sorted(tuple(sorted(peers)) for peers in held)


def candidates(load: Load, world: int, *, order: Order = "contiguous", per_node: int | None = None) -> list[Placement]:
    """Placements to choose from, as of rank 0; each cuts the batch so that no rank is without rows. First those that
    have fewest peers a rank, as `placement.kind: auto` has always chosen; then those of uneven groups; and last, unless
    that is the order anyhow, all of these interleaved."""
    found: dict[object, Placement] = {}
    for each in dict.fromkeys((order, "interleaved")):
        for placement in _candidates(load, world, each, per_node):
            if placement.least_rows(load.batch, load.parts, load.unit) > 0:
                found.setdefault(_key(placement), placement)
    return list(found.values())


def _candidates(load: Load, world: int, order: Order, per_node: int | None) -> Iterator[Placement]:
    count = len(load.peers)
    for per_rank in (m for m in range(1, count + 1) if count % m == 0):
        if world % (count // per_rank) == 0:
            yield Placement.even(count, per_rank, world, 0, None, order)
    costs = [sum(peer.seconds(max(2, load.batch // max(world // count, 1) // load.parts))) for peer in load.peers]
    for counts in _counts(costs, world):
        yield balanced(costs, world, 0, counts, order, per_node)
    for groups in range(2, min(count, world + 1)):
        # Peers dealt to fewer groups than there are peers, and these to ranks in proportion.
        held = peers_of_ranks(costs, groups)
        ranks = arranged(ranks_of_peers([sum(costs[k] for k in peers) for peers in held], world), order, per_node)
        yield Placement(count, tuple(Group(*each) for each in zip(held, ranks, strict=True)), 0, order=order)


def _key(placement: Placement) -> object:
    return tuple((tuple(group.peers), tuple(group.ranks)) for group in placement.groups)


def _counts(costs: Sequence[float], world: int) -> Iterator[list[int] | None]:
    """Ranks of each peer: in proportion to its cost, and one or two more or less of the first two kinds."""
    if world < len(costs):
        yield None
        return
    best = ranks_of_peers(costs, world)
    yield best
    for giver, taker in itertools.permutations(range(min(len(costs), 4)), 2):
        for moved in (1, 2):
            if best[giver] > moved:
                changed = list(best)
                changed[giver] -= moved
                changed[taker] += moved
                yield changed


def may_restart() -> bool:
    """Whether the launcher starts ranks anew, on as many as are left: then `placement.ranks` are proportions. Alike on
    all ranks, as the number of restarts so far need not be."""
    return os.environ.get("TORCHELASTIC_MAX_RESTARTS", "0") not in ("", "0")


def automatic(config: RunConfig, world: int) -> tuple[Placement, str] | None:
    """What `placement.kind: auto` comes to, as of rank 0, and why; None where fewest peers a rank is the answer, as for
    peers that are all alike.

    A function of the config and the number of ranks alone, so that a run that goes on has its placement again: it is
    reckoned for nodes of 8 GPUs of one kind, whatever there is.
    """
    if world == 1 or len({(peer.network, repr(peer.options), peer.learns) for _, peer in config.cohort}) == 1:
        return None
    try:
        load = load_of(config, AUTO.gpu)
    except (RuntimeError, ValueError, TypeError):  # Who builds the networks says what is wrong with them.
        return None
    found = candidates(load, world, order=config.placement.order)
    if not found:
        return None
    best, why = choose([predict(placement, load, AUTO) for placement in found])
    return best.placement, why


def _dealt(config: RunConfig, world: int, rank: int, per_node: int | None) -> Placement:
    num_peers, wanted = len(config.cohort), config.placement
    names = [name for name, _ in config.cohort]
    if wanted.kind == "balanced":
        counts = None
        if wanted.ranks is not None:
            counts = [wanted.ranks[name] for name in names]
            if sum(counts) != world and may_restart():
                return balanced([float(n) for n in counts], world, rank, None, wanted.order, per_node)
            if sum(counts) != world:
                scaled = ""
                if world >= num_peers:
                    pairs = zip(names, ranks_of_peers([float(n) for n in counts], world), strict=True)
                    scaled = f"; nearest: {{{', '.join(f'{name}: {count}' for name, count in pairs)}}}"
                given = ", ".join(f"{name}: {count}" for name, count in zip(names, counts, strict=True))
                raise ConfigError(
                    f"placement.ranks = {{{given}}}: {sum(counts)} ranks in all, found {world}{scaled}, or leave them "
                    "out, to have them chosen by what the peers cost"
                )
        costs = [1.0] * num_peers if counts else costs_of(config)
        return balanced(costs, world, rank, counts, wanted.order, per_node)
    divisors = [m for m in range(1, num_peers + 1) if num_peers % m == 0]
    fitting = [m for m in divisors if world % (num_peers // m) == 0]
    only = None
    if wanted.kind == "jobs":
        if wanted.peer is None:
            raise ConfigError(
                "placement.peer: missing; with placement.kind = jobs each job is told which peer it trains: one of "
                f"{', '.join(names)}, such as placement.peer={names[0]}"
            )
        only, peers_per_rank, fitting = names.index(wanted.peer), 1, [1]
    elif wanted.kind == "auto":
        peers_per_rank = fitting[0]
    elif wanted.kind == "colocated":
        peers_per_rank = num_peers
    elif wanted.kind == "spread":
        peers_per_rank = 1
    else:
        peers_per_rank = wanted.peers_per_rank or 1
        if peers_per_rank not in divisors:
            raise ConfigError(
                f"placement.peers_per_rank = {peers_per_rank}: expected a divisor of the number of peers, {num_peers}: "
                f"one of {_listed(divisors)}"
            )
    if peers_per_rank not in fitting:
        groups = num_peers // peers_per_rank
        raise ConfigError(
            f"placement.kind = {wanted.kind}: {num_peers} peers, {peers_per_rank} a rank, need a multiple of {groups} "
            f"ranks, found {world}; nearest: {_nearest_multiples(world, groups)}, or placement.kind = auto"
        )
    return Placement.even(num_peers, peers_per_rank, world, rank, only, wanted.order)


def _listed(numbers: list[int]) -> str:
    return ", ".join(str(n) for n in numbers)


def _nearest_multiples(value: int, step: int) -> str:
    below = value // step * step
    return " or ".join(str(n) for n in (below, below + step) if n > 0)

"""Chooses the placement that a config asks for."""

from __future__ import annotations

from collections.abc import Sequence

from engine.config import ConfigError, RunConfig
from engine.ranks.costs import costs_of
from engine.ranks.placement import Group, Order, Placement, arranged


def plan(config: RunConfig, world: int, rank: int, per_node: int | None = None) -> Placement:
    """Chooses the placement that the config asks for on `world` ranks.

    Args:
        per_node: ranks of a node, the same on all ranks; None where that does not matter.

    Raises:
        ConfigError: where peers cannot be dealt to the ranks, or the global batch to the replicas, or a job of one peer
            has not been told which.
    """
    placement = _dealt(config, world, rank, per_node)
    batch, parts, unit = config.data.global_batch, config.train.accumulation, config.data.tuple_size
    if placement.is_even and placement.kind != "balanced":
        _check_even(config, placement)
    elif not placement.least_rows(batch, parts, unit):
        most = max(placement.groups, key=lambda group: len(group.ranks))
        names = " and ".join(config.cohort[k][0] for k in most.peers)
        needed = len(most.ranks) * parts * unit
        tuples = f", {unit} rows that stay together for each" if unit > 1 else ""
        raise ConfigError(
            f"data.global_batch = {batch}: too few rows for {len(most.ranks)} ranks of {names} x {parts} micro-batches"
            f"{tuples}; nearest: {needed}"
        )
    return placement


def plan_scoring(config: RunConfig, world: int, rank: int) -> Placement:
    """The placement for scoring, to which it does not matter how large the batches of training are.

    Raises:
        ConfigError: where peers cannot be dealt to the ranks.
    """
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
    return Placement(len(costs), tuple(Group(*each) for each in zip(held, ranks, strict=True)), rank)


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


def _dealt(config: RunConfig, world: int, rank: int, per_node: int | None) -> Placement:
    num_peers, wanted = len(config.cohort), config.placement
    names = [name for name, _ in config.cohort]
    if wanted.kind == "balanced":
        counts = None
        if wanted.ranks is not None:
            counts = [wanted.ranks[name] for name in names]
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


def _check_even(config: RunConfig, placement: Placement) -> None:
    parts = placement.replicas * config.train.accumulation * config.data.tuple_size
    batch = config.data.global_batch
    if batch % parts:
        kin = "that are mixed" if config.data.augmentation.mixing.on else "of a class"
        whole = f" in whole tuples of {config.data.tuple_size} images {kin}" if config.data.tuple_size > 1 else ""
        raise ConfigError(
            f"data.global_batch = {batch}: cannot be split evenly over {placement.replicas} replicas x "
            f"{config.train.accumulation} micro-batches{whole}; nearest: {_nearest_multiples(batch, parts)}"
        )


def _listed(numbers: list[int]) -> str:
    return ", ".join(str(n) for n in numbers)


def _nearest_multiples(value: int, step: int) -> str:
    below = value // step * step
    return " or ".join(str(n) for n in (below, below + step) if n > 0)

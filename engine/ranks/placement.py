"""Who computes what: which rank holds which peers, on which rows of the global batch."""

from __future__ import annotations

from dataclasses import dataclass

from engine.config import ConfigError, RunConfig


@dataclass(frozen=True)
class Placement:
    """One rank's place in a rectangle of `groups` x `replicas` ranks.

    The K peers are dealt to the groups in order, `peers_per_rank` to each. The ranks of a group hold the same peers and
    average their gradients (the replica group); they are contiguous, so that a group fills whole nodes. Ranks with the
    same `replica` see the same rows and exchange signals.

    Where peers are jobs of their own, this is a place in one of them: all its ranks are one group, of the peer `only`.
    """

    num_peers: int
    peers_per_rank: int
    world: int
    rank: int
    only: int | None = None

    @property
    def peers(self) -> range:
        """The peers that live in this job: all K, or one."""
        return range(self.num_peers) if self.only is None else range(self.only, self.only + 1)

    @property
    def groups(self) -> int:
        """P, the number of groups of peers."""
        return len(self.peers) // self.peers_per_rank

    @property
    def replicas(self) -> int:
        """D, the number of ranks that share the rows of a global batch between them."""
        return self.world // self.groups

    @property
    def group(self) -> int:
        """Which group of peers lives on this rank."""
        return self.rank // self.replicas

    @property
    def replica(self) -> int:
        """Which share of the rows this rank computes."""
        return self.rank % self.replicas

    @property
    def residents(self) -> range:
        """The peers that live on this rank."""
        return self.peers[self.group * self.peers_per_rank : (self.group + 1) * self.peers_per_rank]

    @property
    def kind(self) -> str:
        """colocated, spread, hybrid or jobs."""
        if self.only is not None:
            return "jobs"
        if self.groups == 1:
            return "colocated"
        return "spread" if self.peers_per_rank == 1 else "hybrid"

    def rows(self, global_batch: int) -> slice:
        """This rank's rows of a global batch."""
        share = global_batch // self.replicas
        return slice(self.replica * share, (self.replica + 1) * share)

    @property
    def replica_ranks(self) -> range:
        """The ranks that hold this rank's peers, and average their gradients, this one among them."""
        return range(self.group * self.replicas, (self.group + 1) * self.replicas)

    @property
    def exchange_ranks(self) -> range:
        """The ranks that see this rank's rows, one of each group of peers, in the order of the groups."""
        return range(self.replica, self.world, self.replicas)

    def __str__(self) -> str:
        peers = (
            f"{self.peers_per_rank} of {self.num_peers} peers a rank" if self.groups > 1 else "all peers on every rank"
        )
        if self.only is not None:
            peers = f"one of {self.num_peers} peers in this one"
        return f"{self.kind}: {peers}, {self.replicas} rank{'s' * (self.replicas > 1)} a peer, {self.world} in all"


def plan(config: RunConfig, world: int, rank: int) -> Placement:
    """Chooses the placement that the config asks for on `world` ranks.

    Raises:
        ConfigError: where peers cannot be dealt to the ranks, or the global batch to the replicas, or a job of one peer
            has not been told which.
    """
    num_peers, wanted = len(config.cohort), config.placement
    divisors = [m for m in range(1, num_peers + 1) if num_peers % m == 0]
    fitting = [m for m in divisors if world % (num_peers // m) == 0]
    only = None
    if wanted.kind == "jobs":
        names = [name for name, _ in config.cohort]
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
    placement = Placement(num_peers, peers_per_rank, world, rank, only)
    parts = placement.replicas * config.train.accumulation * config.data.tuple_size
    batch = config.data.global_batch
    if batch % parts:
        kin = "that are mixed" if config.data.augmentation.mixing.on else "of a class"
        whole = f" in whole tuples of {config.data.tuple_size} images {kin}" if config.data.tuple_size > 1 else ""
        raise ConfigError(
            f"data.global_batch = {batch}: cannot be split evenly over {placement.replicas} replicas x "
            f"{config.train.accumulation} micro-batches{whole}; nearest: {_nearest_multiples(batch, parts)}"
        )
    return placement


def plan_scoring(config: RunConfig, world: int, rank: int) -> Placement:
    """The placement for scoring, to which it does not matter how large the batches of training are.

    Raises:
        ConfigError: where peers cannot be dealt to the ranks.
    """
    data = config.data.model_copy(update={"global_batch": world, "sampler": "shuffle"})
    train = config.train.model_copy(update={"accumulation": 1})
    return plan(config.model_copy(update={"data": data, "train": train}), world, rank)


def _listed(numbers: list[int]) -> str:
    return ", ".join(str(n) for n in numbers)


def _nearest_multiples(value: int, step: int) -> str:
    below = value // step * step
    return " or ".join(str(n) for n in (below, below + step) if n > 0)

"""What a step would take in a placement: foretold from counts and a table of GPUs, or from peers that were timed."""

from __future__ import annotations

import functools
import math
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace

from data_pipelines.sources.sections import PHOTOS
from engine.config import RunConfig
from engine.ranks.exchanging.traffic import Traffic, traffic_of_all
from engine.ranks.placement import Group, Placement, Share
from engine.ranks.planning.footprint import footprint_of
from engine.ranks.planning.hardware import BUCKET, DECODED, DECODED_ON_CPU, LATENCY, LINKS, MESSAGE, OVERLAPPED, Gpu
from losses import METHODS

_Shares = tuple[Share, ...]

BETTER = 0.95
"""What a placement has to take of the first's time to be preferred: less is within what is foretold wrongly."""

ALIKE = 1.02
"""Of the fastest's time, what counts as fast as that."""


@dataclass(frozen=True)
class PeerLoad:
    """One peer."""

    name: str
    seconds: Callable[[int], tuple[float, float]]
    """Of a pass forward and of one backward, for so many images."""
    gradients: int
    """Bytes that its replicas average; 0 where nothing learns."""


@dataclass(frozen=True)
class Load:
    """What of a run makes the time of its steps."""

    peers: Sequence[PeerLoad]
    batch: int
    parts: int = 1
    """Micro-batches."""
    unit: int = 1
    """Neighbouring rows that are never parted."""
    shown: Mapping[int, int] | None = None
    """Numbers of a row that each peer shows to those who see it too; None where there is no exchange."""
    everywhere: Mapping[int, int] | None = None
    """Numbers of a row that each peer shows to all ranks."""
    wire: int = 4
    """Bytes of a number under way."""
    comes_back: bool = False
    """Whether gradients of signals go the way back."""
    decoded: float | None = None
    """Images a second that a rank decodes; None where nothing is decoded."""
    shared_decode: bool = True
    """Whether ranks of a node decode each row once."""


def load_of(config: RunConfig, gpu: Gpu, classes: int | None = None) -> Load:
    """A run's load on a GPU, from counts: peers that show each other their logits. Heads are not counted.

    Raises:
        ValueError, RuntimeError or TypeError: a network does not take the images.
    """
    classes = classes or config.data.num_classes or 1000
    tf32, compiled = config.precision.tf32, config.precision.compile
    peers = []
    for name, peer in config.cohort:
        counted = footprint_of(config, peer, classes)
        seconds = functools.cache(functools.partial(counted.seconds, gpu=gpu, tf32=tf32, compiled=compiled))
        peers.append(PeerLoad(name, seconds, 4 * counted.parameters))
    shows = METHODS[config.method.name].exchange != "none"
    decoded, shared = _decoder(config)
    return Load(
        peers,
        config.data.global_batch,
        config.train.accumulation,
        config.data.tuple_size,
        decoded=decoded,
        shared_decode=shared,
        shown=dict.fromkeys(range(len(peers)), classes) if shows else None,
        wire=2 if config.placement.exchange_dtype == "bf16" else 4,
    )


def _decoder(config: RunConfig) -> tuple[float | None, bool]:
    """Images a second that a rank decodes, if any, and whether ranks of a node share them."""
    data = config.data
    if data.dataset not in PHOTOS:
        return None, False
    if data.decoding.decoder in ("auto", "mixed"):  # A GPU decodes, and passes nothing on.
        return DECODED, False
    return DECODED_ON_CPU * data.decoding.threads / 8, data.shared_decode != "off" and data.views == "shared"


@dataclass(frozen=True)
class Cluster:
    """Nodes of GPUs alike."""

    gpu: Gpu
    per_node: int

    def node(self, rank: int) -> int:
        """The node of a rank."""
        return rank // self.per_node

    def exchange(self, each: Iterable[Traffic], *, twice: bool = False) -> float:
        """Seconds of an exchange that brings so much to each rank, until the last has it; `twice`: in two levels."""
        within, across = (LINKS * min(self.gpu.inside, link) for link in (self.gpu.inside, self.gpu.between))
        most, spans = 0.0, False
        for got in each:
            spans = spans or got.across > 0
            inside = got.received - got.across
            most = max(most, got.across / across + inside / within + MESSAGE * got.messages)
        begin = LATENCY["between" if spans else "inside"] + LATENCY["inside"] * twice
        return begin + most if most else 0.0

    def seconds(self, size: float, *, spans: bool) -> float:
        """For so many bytes to one rank, over the network where the ranks are of several nodes."""
        link = min(self.gpu.inside, self.gpu.between) if spans else self.gpu.inside
        return LATENCY["between" if spans else "inside"] + size / (LINKS * link)


@dataclass(frozen=True)
class Prediction:
    """A step in a placement: seconds, and bytes of all ranks."""

    placement: Placement
    compute: float
    """Forward and backward, the mean over ranks."""
    gradients: float
    """Of their averaging, what the slowest rank cannot hide behind its pass backward."""
    exchange: float
    waiting: float
    """For the slowest rank, the mean over ranks."""
    decode: float
    """What decoding takes longer than all that."""
    ideal: float
    """Compute, if it could be dealt to the ranks without a rest."""
    inside: int
    """Bytes within nodes, and"""
    between: int
    """between them."""
    hierarchical: bool = False
    """Whether signals are exchanged in two levels."""

    @property
    def step(self) -> float:
        """Seconds of a step."""
        return self.compute + self.gradients + self.exchange + self.waiting + self.decode

    @property
    def efficiency(self) -> float:
        """Of the ideal."""
        return self.ideal / self.step


def predict(placement: Placement, load: Load, cluster: Cluster) -> Prediction:
    """Foretells a step. `placement` may be that of any rank."""
    busy, exposed = [], []
    shares = _shares(placement, load)
    for group in placement.groups:
        work = [_work(shares[rank], group, load) for rank in _kinds(group)]
        forward, back, last = (max(each[i] for each in work) for i in range(3))
        spans = len({cluster.node(rank) for rank in group.ranks}) > 1
        exposed.append(_exposed(group, load, cluster, last, spans=spans))
        busy += [(forward + back, sum(sum(each[:2]) for each in work) / len(work), len(group.ranks))]
    world = placement.world
    compute = sum(mean * ranks for _, mean, ranks in busy) / world
    slowest = max(range(len(busy)), key=lambda g: busy[g][0] + exposed[g])
    gradients = exposed[slowest]
    waiting = max(0.0, busy[slowest][0] - compute)
    signals = exchanged(placement, load, cluster, shares)
    exchange = signals.seconds
    so_far = compute + gradients + waiting + exchange
    decode = max(0.0, _decoding(shares, load, cluster) - so_far)
    averaged = averaging(placement, load, cluster)
    ideal = sum(sum(peer.seconds(math.ceil(load.batch / load.parts / world))) for peer in load.peers) * load.parts
    return Prediction(
        placement,
        compute,
        gradients,
        exchange,
        waiting,
        decode,
        min(ideal, so_far),
        signals.inside + averaged[0],
        signals.between + averaged[1],
        signals.hierarchical,
    )


def choose(predictions: Sequence[Prediction]) -> tuple[Prediction, str]:
    """The one to take, and why, in a sentence. The first stays unless another is clearly faster; of those that are as
    fast, the one that sends least."""
    first = predictions[0]
    fastest = min(predictions, key=lambda each: each.step)
    if fastest.step > BETTER * first.step:
        others = [each for each in predictions if each is not first]
        if not others:
            return first, "nothing else can be made of this batch, these peers and ranks"
        other = min(others, key=lambda each: each.step)
        gap = other.step / first.step - 1
        than = f"{short(other.placement)} would take {abs(gap):.0%} {'longer' if gap >= 0 else 'less'}"
        return first, f"{than}, which is too little to leave the fewest peers a rank" if gap < 0 else than
    alike = [each for each in predictions if each.step <= ALIKE * fastest.step]
    best = min(alike, key=lambda each: (each.between, each.inside, each.step))
    saved, held = 1 - best.step / first.step, short(first.placement)
    if first.waiting - best.waiting > first.gradients - best.gradients + first.exchange - best.exchange:
        reason = f"ranks of the cheaper peers would wait for the others {first.waiting / first.step:.0%} of a step"
    else:
        reason = "more of gradients and signals would be under way while nothing is computed"
    return best, f"a step takes {saved:.0%} less than in {held}, where {reason}"


def short(placement: Placement) -> str:
    """A placement in a word, with the ranks of each group where they are uneven."""
    counts = ":".join(str(len(group.ranks)) for group in placement.groups)
    kind = f"{placement.kind} ({counts})" if placement.kind == "balanced" else placement.kind
    return f"{kind}, interleaved" if placement.order == "interleaved" and len(placement.groups) > 1 else kind


def _kinds(group: Group) -> list[int]:
    """Ranks of a group whose shares of the rows may differ in size: all, or of many as many as show the sizes."""
    ranks = group.ranks
    return list(ranks) if len(ranks) <= 16 else [*ranks[:8], *ranks[-8:]]


def _shares(placement: Placement, load: Load) -> list[_Shares]:
    """The rows of every rank, micro-batch by micro-batch."""
    return [placement.of(rank).cut(load.batch, load.parts, load.unit) for rank in range(placement.world)]


def _work(shares: _Shares, group: Group, load: Load) -> tuple[float, float, float]:
    """Seconds that a rank computes forward, backward, and backward in the last micro-batch."""
    forward = back = last = 0.0
    for share in shares:
        times = [load.peers[k].seconds(len(share.rows)) for k in group.peers]
        forward += sum(there for there, _ in times)
        last = sum(back for _, back in times)
        back += last
    return forward, back, last


def _exposed(group: Group, load: Load, cluster: Cluster, last: float, *, spans: bool) -> float:
    """Seconds of a group's averaging of gradients beyond the pass backward that hides them."""
    size, ranks = sum(load.peers[k].gradients for k in group.peers), len(group.ranks)
    if ranks == 1 or not size:
        return 0.0
    whole = cluster.seconds(2 * (ranks - 1) / ranks * size, spans=spans)
    return max(whole - OVERLAPPED * last, whole * min(1.0, BUCKET / size))


def averaging(placement: Placement, load: Load, cluster: Cluster) -> tuple[int, int]:
    """Bytes within and between nodes of averaging gradients, round a ring in the order of ranks."""
    inside = between = 0
    for group in placement.groups:
        size, ranks = sum(load.peers[k].gradients for k in group.peers), group.ranks
        if len(ranks) == 1:
            continue
        hops = [cluster.node(a) != cluster.node(b) for a, b in zip(ranks, [*ranks[1:], ranks[0]], strict=True)]
        each = 2 * (len(ranks) - 1) * size // len(ranks)
        between += each * sum(hops)
        inside += each * (len(hops) - sum(hops))
    return inside, between


@dataclass(frozen=True)
class Exchanged:
    """The exchanges of a step, of all ranks; the way back counted as often as the way there."""

    inside: int
    """Bytes within nodes, and"""
    between: int
    """between them."""
    seconds: float
    hierarchical: bool
    """Whether in two levels."""


def exchanged(placement: Placement, load: Load, cluster: Cluster, shares: Sequence[_Shares] | None = None) -> Exchanged:
    """What a step exchanges, in one level or, where that is foretold to be faster, in two."""
    if load.shown is None:
        return Exchanged(0, 0, 0.0, False)
    placement = replace(placement, per_node=cluster.per_node)
    shares = shares or _shares(placement, load)
    flat = _in(placement, load, cluster, shares, hierarchical=False)
    if not flat.between or (len(placement.groups) < 3 and not load.everywhere):
        return flat  # A rank sees no row of another group that a second rank sees too.
    two = _in(placement, load, cluster, shares, hierarchical=True)
    return two if two.seconds < flat.seconds and two.between < flat.between else flat


def _in(
    placement: Placement, load: Load, cluster: Cluster, shares: Sequence[_Shares], *, hierarchical: bool
) -> Exchanged:
    assert load.shown is not None
    inside = between = 0
    seconds = 0.0
    for micro in range(load.parts):
        own = [share[micro] for share in shares]
        each = traffic_of_all(placement, own, load.shown, load.everywhere, load.wire, hierarchical=hierarchical)
        across = sum(got.across for got in each)
        inside, between = inside + sum(got.received for got in each) - across, between + across
        seconds += cluster.exchange(each, twice=hierarchical)
    ways = 1 + load.comes_back
    return Exchanged(ways * inside, ways * between, ways * seconds, hierarchical)


def _decoding(shares: Sequence[_Shares], load: Load, cluster: Cluster) -> float:
    """Seconds until the rank that has most to decode in a step has done so; where they share, ranks of the node do."""
    if load.decoded is None:
        return 0.0
    if not load.shared_decode:
        return max(sum(len(share.rows) for share in own) for own in shares) / load.decoded
    wanted: dict[int, list[range]] = {}
    for rank, own in enumerate(shares):
        wanted.setdefault(cluster.node(rank), []).extend(share.rows for share in own)
    ranks = Counter(cluster.node(rank) for rank in range(len(shares)))
    return max(distinct(each) / (ranks[node] * load.decoded) for node, each in wanted.items())


def distinct(intervals: Sequence[range]) -> int:
    """How many rows there are in any of them."""
    count, end = 0, 0
    for rows in sorted(intervals, key=lambda each: each.start):
        count += max(0, rows.stop - max(rows.start, end))
        end = max(end, rows.stop)
    return count

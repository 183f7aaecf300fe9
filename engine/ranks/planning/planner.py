"""What a step would take in a placement: foretold from counts and a table of GPUs, or from peers that were timed."""

from __future__ import annotations

import bisect
import functools
import itertools
import math
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from data_pipelines.sources.sections import PHOTOS
from engine.config import RunConfig
from engine.ranks.placement import Group, Placement, Share
from engine.ranks.planning.footprint import footprint_of
from engine.ranks.planning.hardware import BUCKET, DECODED, DECODED_ON_CPU, LATENCY, LINKS, OVERLAPPED, Gpu
from engine.ranks.routes import NUMBERS_OF_A_ROW, gathers, overlap
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
    inside, between, most = exchanged(placement, load, cluster, shares)
    apart = _exchange_spans(placement, load, cluster)
    exchange = cluster.seconds(most, spans=apart) * (1 + load.comes_back) if most else 0.0
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
        inside + averaged[0],
        between + averaged[1],
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
    return f"{placement.kind} ({counts})" if placement.kind == "balanced" else placement.kind


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


def exchanged(
    placement: Placement, load: Load, cluster: Cluster, shares: Sequence[_Shares] | None = None
) -> tuple[int, int, int]:
    """Bytes of the signals of a step within nodes and between them, of all ranks, and what the rank that gets most
    gets in the largest micro-batch; the way back counted as often as the way there."""
    if load.shown is None:
        return 0, 0, 0
    inside = between = most = 0
    shares = shares or _shares(placement, load)
    group_of = {rank: g for g, group in enumerate(placement.groups) for rank in group.ranks}
    wide_of, labels = load.everywhere or {}, NUMBERS_OF_A_ROW if load.everywhere else 0
    near = [sum(load.shown.get(k, 0) for k in group.peers) for group in placement.groups]
    wide = [sum(wide_of.get(k, 0) for k in group.peers) for group in placement.groups]
    for micro in range(load.parts):
        rows = [share[micro].rows for share in shares]
        got: Counter[int] = Counter()
        if gathers(placement, shares[0][micro], everywhere=bool(load.everywhere)):
            own = [0] if len(placement.groups) == 1 else near
            longest = len(rows[0]) * max(a + b + labels for a, b in zip(own, wide, strict=True)) * load.wire
            if load.everywhere:
                a, b = _to_all(dict.fromkeys(range(placement.world), longest), cluster, got)
            else:
                a, b = _among(placement, longest, cluster, got)
        else:
            a, b = _common(placement, rows, near, cluster, load.wire, got)
            if load.everywhere:
                sizes = {r: len(rows[r]) * wide[group_of[r]] * load.wire for r in range(placement.world)}
                of_groups = [{r: len(rows[r]) * labels * load.wire for r in group.ranks} for group in placement.groups]
                for each in (sizes, *of_groups):
                    more = _to_all(each, cluster, got)
                    a, b = a + more[0], b + more[1]
        inside, between, most = inside + a, between + b, max(most, max(got.values(), default=0))
    ways = 1 + load.comes_back
    return ways * inside, ways * between, most


def _among(placement: Placement, size: int, cluster: Cluster, got: Counter[int]) -> tuple[int, int]:
    """Every rank gets `size` from each other that sees its rows, in an even placement."""
    found = [0, 0]
    for ranks in zip(*(group.ranks for group in placement.groups), strict=True):
        for rank, other in itertools.permutations(ranks, 2):
            found[cluster.node(rank) != cluster.node(other)] += size
            got[rank] += size
    return found[0], found[1]


def _to_all(sizes: Mapping[int, int], cluster: Cluster, got: Counter[int]) -> tuple[int, int]:
    """Every one of some ranks gets what each other one has for all."""
    nodes: Counter[int] = Counter()
    members: Counter[int] = Counter()
    for rank, size in sizes.items():
        nodes[cluster.node(rank)] += size
        members[cluster.node(rank)] += 1
    whole = sum(sizes.values())
    for rank, size in sizes.items():
        got[rank] += whole - size
    inside = sum(size * (members[node] - 1) for node, size in nodes.items())
    return inside, whole * (len(sizes) - 1) - inside


def _common(
    placement: Placement,
    rows: Sequence[range],
    near: Sequence[int],
    cluster: Cluster,
    wire: int,
    got: Counter[int],
) -> tuple[int, int]:
    """Every rank gets the rows that it sees too from the ranks of each other group. Within a group rows ascend."""
    found = [0, 0]
    starts = [[rows[rank].start for rank in group.ranks] for group in placement.groups]
    for g, group in enumerate(placement.groups):
        for h, other in enumerate(placement.groups):
            if g == h or not near[h]:
                continue
            for rank in group.ranks:
                mine = rows[rank]
                for at in range(max(0, bisect.bisect_right(starts[h], mine.start) - 1), len(other.ranks)):
                    sender = other.ranks[at]
                    if rows[sender].start >= mine.stop:
                        break
                    size = len(overlap(mine, rows[sender])) * near[h] * wire
                    found[cluster.node(rank) != cluster.node(sender)] += size
                    got[rank] += size
    return found[0], found[1]


def _exchange_spans(placement: Placement, load: Load, cluster: Cluster) -> bool:
    if load.everywhere:
        return cluster.node(placement.world - 1) > 0
    return any(
        len({cluster.node(rank) for rank in placement.of(rank).exchange_ranks}) > 1
        for rank in placement.groups[0].ranks[: 4 * cluster.per_node]
    )


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

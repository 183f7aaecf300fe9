"""Evaluation that counts every validation image exactly once, at any number of ranks, batch size and placement."""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from data_pipelines import Pipeline
from engine.cohort import precision
from engine.cohort.cohort import Cohort
from engine.config import RunConfig
from engine.ranks.exchanging.exchange import Exchange
from engine.ranks.placement import Placement
from engine.training import calibration
from engine.training.predictions import Ledger, Predictions
from engine.training.showing import shown
from losses.capabilities import EarlyExits, HeldOutSurveys, Teachers


@dataclass(frozen=True)
class Score:
    """Of one network or of an ensemble, over the validation split."""

    top1: float
    """Percent of images whose most probable class is right."""
    top5: float
    """Percent of images whose class is among the five most probable."""
    loss: float
    """Mean cross-entropy, in nats."""
    spread: float
    """How much the probabilities p depend on the image: E|p - E p|^2 / E|p|^2; 0 where all images get the same."""
    ece: float
    """Expected calibration error, from 0 to 1, see `engine.training.calibration`."""
    further: tuple[float, ...] = ()
    """As top5, for each further k that was asked for."""


@dataclass(frozen=True)
class Scores:
    """Of a whole cohort."""

    peers: list[Score]
    ensemble: Score
    """Of the mean of the peers' probabilities."""
    disagreement: float
    """Percent of images on which two peers name different classes, the mean over pairs of peers; 0 for one peer."""
    apart: list[float]
    """Of each peer, how far its logits z are from those z' of the peer nearest to it: E|z - z'|^2 over the mean of
    E|z|^2 and E|z'|^2, each less its mean over classes; 0 where two peers compute the same. Empty for one peer."""
    unreadable: int = 0
    """Images that cannot be read; they count as wrong, and have no loss."""


def evaluate(
    networks: Mapping[int, nn.Module],
    exchange: Exchange,
    placement: Placement,
    pipeline: Pipeline,
    *,
    batch: int,
    device: torch.device,
    autocast: torch.dtype | None = None,
    topk: Sequence[int] = (),
    ledger: Ledger | None = None,
    counted: Callable[[int], None] = lambda _: None,
) -> Scores:
    """Scores the peers of this job; every rank calls it with its residents' networks and gets the same result.

    Args:
        networks: of the residents, by the number of the peer.
        exchange: shows their logits to the others.
        placement: of this rank.
        pipeline: whose validation split is scored.
        batch: images of one forward pass.
        device: of the networks.
        autocast: number format of the networks' layers; None as they are.
        topk: further k than 1 and 5.
        ledger: takes down what the peers and the ensemble name for each image; whoever made it closes it.
        counted: told the number of images of each batch.

    Raises:
        RuntimeError: the images counted are not the validation split, each once.
    """
    num_peers, pairs = len(placement.peers), list(itertools.combinations(range(len(placement.peers)), 2))
    # A row for each peer; last row: the ensemble. Columns: right, right among five, right among each further k.
    among = (1, 5, *topk)
    right = torch.zeros(num_peers + 1, len(among), dtype=torch.int64, device=device)
    # Sums over images: loss, |p|^2 and p of each row of `right`; |z - z'|^2 of all pairs and |z|^2 of all peers; what
    # calibration is made of, of each row of `right`.
    classes = pipeline.num_classes
    sizes = [num_peers + 1, num_peers + 1, (num_peers + 1) * classes, len(pairs), num_peers]
    sizes.append((num_peers + 1) * calibration.BINS)
    sums = torch.zeros(sum(sizes), dtype=torch.float64, device=device)
    loss, squares, totals, gaps, lengths, off = sums.split(sizes)
    # Images, sum of their ids, sum of the squares of their ids; disagreements of all pairs; images that are not there.
    seen = torch.zeros(5, dtype=torch.int64, device=device)
    with _evaluated(networks), torch.inference_mode():
        batches = pipeline.evaluate(placement.replica, placement.replicas, batch)
        part = batches, pipeline.eval_size, classes
        for ids, targets, signals in shown(networks, exchange, placement, *part, device, autocast):
            logits = torch.stack([signals[k]["logits"] for k in placement.peers])
            probabilities = F.softmax(logits, dim=-1)
            ensemble = probabilities.mean(0).clamp_min(torch.finfo(torch.float32).tiny).log()
            for row, k in enumerate(placement.peers):
                if k in networks:
                    _count(logits[row], targets, among, right[row], loss[row])
            if placement.group == 0:
                _count(ensemble, targets, among, right[-1], loss[-1])
                if ledger is not None:
                    ledger.add(ids, targets, torch.cat([logits, ensemble[None]]))
                named = logits.argmax(-1)
                different = (
                    torch.stack([(named[i] != named[j]).sum() for i, j in pairs]).sum() if pairs else seen[3] * 0
                )
                given = torch.cat([probabilities, probabilities.mean(0, keepdim=True)]).double()
                squares += given.square().sum((1, 2))
                totals += given.sum(1).flatten()
                off += calibration.excess(given, targets).flatten()
                centred = logits.double() - logits.double().mean(-1, keepdim=True)
                lengths += centred.square().sum((1, 2))
                if pairs:
                    gaps += torch.stack([(centred[i] - centred[j]).square().sum() for i, j in pairs])
                count, missing = torch.tensor(len(ids), device=device), (targets < 0).sum()
                seen += torch.stack([count, ids.sum(), (ids * ids).sum(), different, missing])
            counted(len(ids))

    dist.all_reduce(right)
    dist.all_reduce(sums)
    dist.all_reduce(seen)
    n = pipeline.eval_size
    total, *checks = seen[:3].tolist()
    if (total, *checks) != (n, n * (n - 1) // 2, (n - 1) * n * (2 * n - 1) // 6):
        raise RuntimeError(
            f"evaluation counted {total} images, or some of them twice; the validation split has {n}, each once"
        )
    unreadable = int(seen[4])
    percent = (right.double() * 100 / n).tolist()
    spread = 1 - totals.view(-1, classes).square().sum(1) / (n * squares)
    losses = (loss / max(n - unreadable, 1)).tolist()
    errors = (off.view(-1, calibration.BINS).abs().sum(1) / max(n - unreadable, 1)).tolist()
    scores = [
        Score(first, fifth, mean, each, ece, tuple(further))
        for (first, fifth, *further), mean, each, ece in zip(percent, losses, spread.tolist(), errors, strict=True)
    ]
    firsts, seconds = (lengths[[pair[side] for pair in pairs]] for side in (0, 1))
    relative = (2 * gaps / (firsts + seconds)).tolist()
    apart = [min(x for pair, x in zip(pairs, relative, strict=True) if k in pair) for k in range(num_peers) if pairs]
    return Scores(scores[:-1], scores[-1], 100.0 * seen[3].item() / (n * max(len(pairs), 1)), apart, unreadable)


def evaluate_cohort(cohort: Cohort, pipeline: Pipeline) -> tuple[dict[str, float], dict[str, Predictions]]:
    """Scores the peers and, where the run keeps them, their moving averages.

    Returns:
        `val/PEER/top1` and so on, and the same with `ema/`; `ensemble` stands beside the peers. The keys of
        `metrics.jsonl`, with those of `score_exits`. Then, where `evaluation` asks for tables, what was named, see
        `score`.
    """
    averaged = bool(cohort.config.train.ema_decay) or isinstance(cohort.method, Teachers)
    networks = {"val": cohort.networks(), **({"ema": cohort.networks(ema=True)} if averaged else {})}
    kept: dict[str, Predictions] = {}
    wanted = cohort.config.evaluation
    into = kept if wanted.per_class or wanted.confusion else None
    values = score(networks, cohort.config, cohort.exchange, cohort.placement, pipeline, cohort.device, into)
    _drop_maps(cohort)
    return values | score_exits(cohort, pipeline), kept


def score(
    networks: Mapping[str, Mapping[int, nn.Module]],
    config: RunConfig,
    exchange: Exchange,
    placement: Placement,
    pipeline: Pipeline,
    device: torch.device,
    kept: dict[str, Predictions] | None = None,
    counted: Callable[[int], None] = lambda _: None,
) -> dict[str, float]:
    """The scores of this rank's networks and all others', as of `evaluate_cohort`, by what they are: `val` or `ema`.

    Args:
        kept: is given what each of them named for each image, by `val` or `ema`: of the peers in order, and of the
            ensemble.
        counted: told the number of images of each batch.
    """
    names = [name for name, _ in config.trained]
    values: dict[str, float] = {}
    topk = config.evaluation.topk
    for prefix, own in networks.items():
        ledger = None if kept is None else Ledger(len(names) + 1, pipeline.eval_size, device)
        scores = evaluate(
            own,
            exchange,
            placement,
            pipeline,
            batch=config.evaluation.batch,
            device=device,
            autocast=precision.AUTOCAST[config.precision.amp],
            topk=topk,
            ledger=ledger,
            counted=counted,
        )
        if kept is not None and ledger is not None:
            kept[prefix] = ledger.close()
        named = {**dict(zip(names, scores.peers, strict=True)), "ensemble": scores.ensemble}
        for name, each in named.items():
            further = {f"top{k}": value for k, value in zip(topk, each.further, strict=True)}
            one = {key: value for key, value in asdict(each).items() if key != "further"} | further
            values |= {f"{prefix}/{name}/{key}": value for key, value in one.items()}
        values |= {f"{prefix}/{name}/apart": apart for name, apart in zip(names, scores.apart, strict=False)}
        values[f"{prefix}/disagreement"] = scores.disagreement
        if scores.unreadable:
            values[f"{prefix}/unreadable"] = scores.unreadable
    return values


def score_exits(cohort: Cohort, pipeline: Pipeline) -> dict[str, float]:
    """Scores what a method has attached to earlier stages of its peers, see `EarlyExits`. Every rank calls it.

    A pass of its own over the validation split: all else is scored on the networks alone, as they are deployed.

    Returns:
        `val/PEER/best_exit`: percent of images that the best of a peer's exits gets right; {} for other methods.
    """
    method, placement = cohort.method, cohort.placement
    if not isinstance(method, EarlyExits):
        return {}
    peers: dict[int, nn.Module] = {k: resident.peer for k, resident in cohort.residents.items()}
    heads = [resident.peer.head for resident in cohort.residents.values()]
    most = torch.tensor(max(method.num_exits(head) for head in heads if head is not None), device=cohort.device)
    dist.all_reduce(most, dist.ReduceOp.MAX)
    right = torch.zeros(placement.num_peers, int(most), dtype=torch.int64, device=cohort.device)
    with _evaluated(peers), torch.inference_mode():
        for rows in pipeline.evaluate(placement.replica, placement.replicas, cohort.config.evaluation.batch):
            for k, peer in peers.items():
                with precision.autocast(cohort.device, cohort.autocast):
                    named = peer(rows.images)["exits"].argmax(-1)
                right[k, : named.shape[1]] += (named == rows.targets[:, None]).sum(0)
    dist.all_reduce(right)
    best = (right.amax(1).double() * 100 / pipeline.eval_size).tolist()
    return {f"val/{name}/best_exit": value for (name, _), value in zip(cohort.config.trained, best, strict=True)}


def survey(cohort: Cohort, pipeline: Pipeline) -> bool:
    """Before an epoch: shows the held-out images to a method that looks at some, see `HeldOutSurveys`.

    It gets the mean over them, on every rank the same; float64, so that the order of the sum does not show.

    Returns:
        Whether it does.
    """
    method = cohort.method
    if not isinstance(method, HeldOutSurveys) or not method.held_out(cohort.config.method):
        return False
    cohort.average_buffers()
    placement, networks = cohort.placement, cohort.networks()
    total = torch.zeros(placement.num_peers**2 + 1, dtype=torch.float64, device=cohort.device)
    with _evaluated(networks), torch.no_grad():
        batches = pipeline.held_out(placement.replica, placement.replicas, cohort.config.evaluation.batch)
        part, numbers = (batches, pipeline.held_out_size, cohort.num_classes), (cohort.device, cohort.autocast)
        for _, targets, signals in shown(networks, cohort.exchange, placement, *part, *numbers):
            total[:-1] += method.survey(signals, targets).flatten()
            total[-1] += len(targets)
    _drop_maps(cohort)
    # All groups of peers have the same sums; over the world they come out the same bits everywhere.
    dist.all_reduce(total)
    method.begin_epoch((total[:-1] / total[-1]).view(placement.num_peers, placement.num_peers))
    return True


@contextlib.contextmanager
def _evaluated(networks: Mapping[int, nn.Module]) -> Iterator[None]:
    """Networks are in evaluation mode within, and afterwards in the one that they were in."""
    training = {k: network.training for k, network in networks.items()}
    for network in networks.values():
        network.eval()
    try:
        yield
    finally:
        for k, network in networks.items():
            network.train(training[k])


def _drop_maps(cohort: Cohort) -> None:
    """Frees the feature maps that networks have left in their taps, where they would lie until the next step."""
    for resident in cohort.residents.values():
        resident.peer.drop_maps()
    if cohort.trunk:
        cohort.trunk.taps.take()


def _count(logits: Tensor, targets: Tensor, among: Sequence[int], right: Tensor, loss: Tensor) -> None:
    best = logits.topk(min(max(among), logits.shape[-1])).indices == targets[:, None]
    right += torch.stack([best[:, :k].sum() for k in among])
    loss += F.nll_loss(F.log_softmax(logits, dim=-1), targets, ignore_index=-1, reduction="sum")

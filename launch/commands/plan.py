"""What launch/plan.py does, once its words are read."""

from __future__ import annotations

import argparse
import contextlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import yaml

from data_pipelines import DataError, check_files
from engine.config import ConfigError, RunConfig
from engine.config import loading as configuration
from engine.outlook import USABLE, Held, largest_batch, largest_share, memory_of, with_signals
from engine.ranks.placement import Placement
from engine.ranks.planning.choosing import candidates, plan
from engine.ranks.planning.hardware import gpu_of
from engine.ranks.planning.planner import Cluster, Load, Prediction, choose, load_of, predict, short
from engine.rehearsal import Images, readable
from launch.bench.passes import timed_peers
from launch.entry import user_errors

IMAGENET = 1_281_167
"""Images of the training split that are reckoned with where the data are not here."""


def run(options: argparse.Namespace, chosen: str, overrides: Sequence[str]) -> None:
    """Prints what each placement would come to, or the best one alone."""
    with user_errors():
        for name, value in (("--gpus", options.gpus), ("--per-node", options.per_node)):
            if value < 1:
                raise ConfigError(f"{name} {value}: expected a number from 1")
        cluster = Cluster(gpu_of(options.gpu), min(options.per_node, options.gpus))
        if options.gpus % cluster.per_node:
            nearest = options.gpus // cluster.per_node * cluster.per_node
            raise ConfigError(
                f"--gpus {options.gpus}: expected whole nodes of {cluster.per_node}; nearest: {nearest} or "
                f"{nearest + cluster.per_node}"
            )
        config = configuration.load(chosen, overrides)
        outlook = look_ahead(config, options.gpus, cluster, measure=options.measure)
        if options.yaml:
            print(yaml.safe_dump({"placement": as_yaml(config, outlook.best.placement)}, sort_keys=False), end="")
        else:
            print(*lines(config, cluster, outlook), sep="\n")


@dataclass(frozen=True)
class Outlook:
    """What is foretold."""

    load: Load
    predictions: Sequence[Prediction]
    best: Prediction
    why: str
    held: Callable[[Sequence[int]], Held]
    images: Images
    alone: Prediction
    """The first peer by itself, on all GPUs."""
    given: Placement | None
    """That of the config, unless it leaves the choice."""


def look_ahead(config: RunConfig, gpus: int, cluster: Cluster, *, measure: bool) -> Outlook:
    """Foretells the placements of a config's peers. Raises: ConfigError, where there is none, or no such step."""
    if config.placement.kind == "jobs":
        raise ConfigError(
            "placement.kind = jobs: each peer is a job of its own, to be planned as one; expected another"
        )
    images = _images(config)
    least = config.train.accumulation * config.data.tuple_size * -(-gpus // len(config.cohort))
    if config.data.global_batch < least:
        raise ConfigError(
            f"data.global_batch = {config.data.global_batch}: too few rows for {gpus} GPUs and {len(config.cohort)} "
            f"peers; expected at least {least}, or fewer GPUs"
        )
    try:
        load = with_signals(load_of(config, cluster.gpu, images.num_classes), config, images)
        held = memory_of(config, images)
        held(range(len(config.cohort)))
    except (RuntimeError, ValueError, TypeError, IndexError) as error:
        reason = str(error).strip().partition("\n")[0]
        raise ConfigError(f"peers: a step of these peers cannot be made without numbers: {reason}") from None
    if measure:
        load = replace(load, peers=timed_peers(config, load, images.num_classes, gpus))
    found = candidates(load, gpus, order=config.placement.order, per_node=cluster.per_node)
    given = None if config.placement.kind == "auto" else plan(config, gpus, 0, cluster.per_node)
    if given is not None and all(given.groups != each.groups for each in found):
        found.append(given)
    predictions = [predict(placement, load, cluster) for placement in found]
    fitting = [each for each in predictions if _fits(each.placement, load, cluster, held)] or predictions
    best, why = choose(fitting)
    if len(fitting) < len(predictions):
        why += f"; of {len(predictions)} placements, {len(fitting)} fit into the memory of a {cluster.gpu.name}"
    first = replace(load, peers=load.peers[:1], shown=None, everywhere=None)
    alone = predict(Placement.even(1, 1, gpus, 0), first, cluster)
    return Outlook(load, predictions, best, why, held, images, alone, given)


def _fits(placement: Placement, load: Load, cluster: Cluster, held: Callable[[Sequence[int]], Held]) -> bool:
    return _memory(placement, load, held) <= USABLE * cluster.gpu.memory


def _memory(placement: Placement, load: Load, held: Callable[[Sequence[int]], Held]) -> float:
    """Bytes of the rank that holds most."""
    rows = largest_share(placement, load)
    return max(held(group.peers).of(rows[g]) for g, group in enumerate(placement.groups))


def _images(config: RunConfig) -> Images:
    with contextlib.suppress(DataError, ImportError):
        sizes = check_files(config.data)
        return Images(sizes.classes, config.data.channels, config.data.side, sizes.train - sizes.held_out)
    return Images(config.data.num_classes or 1000, config.data.channels, config.data.side, IMAGENET)


def as_yaml(config: RunConfig, placement: Placement) -> dict[str, object]:
    """The section of a config that gives this placement."""
    names = [name for name, _ in config.cohort]
    found: dict[str, object] = {"kind": placement.kind}
    if placement.kind == "hybrid":
        found["peers_per_rank"] = len(placement.groups[0].peers)
    if placement.kind == "balanced" and all(len(group.peers) == 1 for group in placement.groups):
        found["ranks"] = {names[group.peers[0]]: len(group.ranks) for group in placement.groups}
    if placement.order == "interleaved" and len(placement.groups) > 1:
        found["order"] = "interleaved"
    return found


_COLUMNS = ("placement", "memory", "step", "compute", "gradients", "exchange", "waiting", "decode")
_MORE = ("inside", "between", "images/s", "GPU hours", "efficiency")


def lines(config: RunConfig, cluster: Cluster, outlook: Outlook) -> list[str]:
    """A table for a person, the choice and why, and what else one would want to know."""
    load, best = outlook.load, outlook.best
    steps = config.train.steps(max(1, outlook.images.count // load.batch))
    gpus = best.placement.world
    rows: list[tuple[str, ...]] = [(*_COLUMNS, *_MORE)]
    for each in outlook.predictions:
        parts = (each.step, each.compute, each.gradients, each.exchange, each.waiting, each.decode)
        rows.append(
            (
                ("* " if each is best else "  ") + short(each.placement),
                readable(int(_memory(each.placement, load, outlook.held))),
                *(f"{1000 * seconds:.1f} ms" for seconds in parts),
                readable(each.inside),
                readable(each.between),
                f"{load.batch / each.step:,.0f}",
                f"{steps * each.step * gpus / 3600:,.1f}",
                f"{each.efficiency:.2f}",
            )
        )
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    table = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]
    nodes = gpus // cluster.per_node
    names = ", ".join(peer.name for peer in load.peers)
    largest = largest_batch(best.placement, load, cluster.gpu.memory, outlook.held)
    more = best.step / outlook.alone.step
    hours = [steps * each.step * gpus / 3600 for each in (outlook.alone, best)]
    return [
        f"{config.title}: {config.method.name} of {names}; {load.batch:,} rows a step on {gpus} x {cluster.gpu.name}, "
        f"{nodes} node{'s' * (nodes > 1)} of {cluster.per_node}; {steps:,} steps",
        "",
        *table,
        "",
        f"{short(best.placement)}: {outlook.why}",
        *(
            [f"the config asks for {short(outlook.given)}"]
            if outlook.given is not None and outlook.given.groups != best.placement.groups
            else []
        ),
        f"batch: up to {largest:,} rows fit into {readable(int(cluster.gpu.memory))} a GPU"
        if largest
        else f"batch: not a row fits into {readable(int(cluster.gpu.memory))} a GPU",
        f"{load.peers[0].name} alone on all GPUs: {1000 * outlook.alone.step:.1f} ms a step, {hours[0]:,.1f} GPU "
        f"hours; all peers: {hours[1]:,.1f}, {more:.2f} times as many"
        if len(load.peers) > 1
        else _second(config, cluster, outlook, steps),
        "bytes are of a step and all ranks; times are foretold, see docs/scaling.md",
    ]


def _second(config: RunConfig, cluster: Cluster, outlook: Outlook, steps: int) -> str:
    """What another peer like the only one would cost."""
    load, gpus = outlook.load, outlook.best.placement.world
    two = replace(load, peers=[*load.peers, *load.peers], shown=dict.fromkeys(range(2), outlook.images.num_classes))
    found = [predict(placement, two, cluster) for placement in candidates(two, gpus, per_node=cluster.per_node)]
    best, _ = choose(found)
    more = best.step / outlook.best.step
    return (
        f"a second peer like it: {steps * best.step * gpus / 3600:,.1f} GPU hours in place of "
        f"{steps * outlook.best.step * gpus / 3600:,.1f}, {more:.2f} times as many, {short(best.placement)}"
    )

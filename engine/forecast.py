"""What a run will do on this rank, as lines to read before it is started."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict

import models
from data_pipelines import Sizes
from data_pipelines.decoding.choice import choose
from engine.config import ConfigError, RunConfig
from engine.preflight import Checked
from engine.ranks.placement import Placement
from engine.ranks.planning.choosing import automatic
from engine.rehearsal import Images, RehearsalError, readable, rehearse
from engine.training.remarks import remarks
from models.weightless import weightless


def forecast(config: RunConfig, checked: Checked, *, cuda: bool = False) -> Iterator[str]:
    """Data, steps, peers, and from a rehearsal of a step the memory of a rank and what the host waits for.

    Args:
        checked: what has been found of it.
        cuda: whether ranks have GPUs, which decides what decodes.

    Raises:
        ConfigError: a step of these networks on these images cannot be made.
    """
    placement, sizes = checked
    trained_on = sizes.trained_on
    batch = config.data.global_batch
    steps, left = divmod(trained_on, batch)
    yield (
        f"data       {trained_on:,} images of {sizes.classes:,} classes to train on, "
        + (f"{sizes.held_out:,} held out, " if sizes.held_out else "")
        + (f"{sizes.left_out:,} left out by data.fraction, " if sizes.left_out else "")
        + f"{sizes.eval:,} to validate; {config.data.side} pixels"
    )
    parts = config.train.accumulation
    yield (
        f"steps      {steps:,} an epoch of {batch:,} images, "
        + f"{_rows_here(config, placement):,} {'a rank' if placement.is_even else 'here'}"
        + (f" in {parts} micro-batches" if parts > 1 else "")
        + f"; {config.train.steps(steps):,} in all"
    )
    yield from sizes.remarks
    if config.data.photos:
        yield f"decoder    {choose(config.data.decoding.decoder, cuda=cuda)}"
    if left and config.data.sampler == "shuffle":
        yield f"left out   {left:,} images of an epoch, each time others: they fill no batch"
    for note in remarks(config, steps, trained_on):
        yield f"note       {note}"
    if config.placement.kind == "auto" and (chosen := automatic(config, placement.world)):
        yield f"placement  {chosen[1]}"
    yield f"peers here {', '.join(_peers(config, placement, sizes))}"
    yield from _rehearsed(config, placement, sizes)


def _rows_here(config: RunConfig, placement: Placement) -> int:
    shares = placement.cut(config.data.global_batch, config.train.accumulation, config.data.tuple_size)
    return sum(len(share.rows) for share in shares)


def _peers(config: RunConfig, placement: Placement, sizes: Sizes) -> Iterator[str]:
    for index in placement.residents:
        name, peer = config.cohort[index]
        with weightless(peer.network):
            network = models.create(peer.network, sizes.classes, config.data.channels, **peer.options)
        yield f"{name} ({sum(p.numel() for p in network.parameters()) / 1e6:,.2f} M parameters)"


def _rehearsed(config: RunConfig, placement: Placement, sizes: Sizes) -> Iterator[str]:
    images = Images(sizes.classes, config.data.channels, config.data.side, sizes.train)
    try:
        found = rehearse(config, placement, images)
    except RehearsalError as error:
        yield f"memory     not known, as a step cannot be made without numbers: {error}"
        return
    except (RuntimeError, ValueError, TypeError, IndexError) as error:
        reason = str(error).strip().partition("\n")[0]
        raise ConfigError(
            f"peers: a step on {_rows_here(config, placement)} images of {config.data.side} pixels "
            f"cannot be made: {reason}; expected networks that take such images"
        ) from None
    parts = asdict(found.memory)
    total = parts.pop("total")
    shown = ", ".join(f"{name} {readable(size)}" for name, size in parts.items() if size)
    yield f"memory     {readable(total)} a rank at the peak of a step: {shown}; libraries and the decoder come on top"
    for wait in found.waits:
        yield f"waits      on a GPU: {wait}"

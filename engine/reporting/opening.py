"""What a run is, said once at its start: who computes what, on what data, for how long."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch

from data_pipelines import Pipeline
from engine.config import RunConfig
from engine.ranks.placement import Placement

_ROWS = 16
"""Groups of ranks that are listed."""


def summary(
    config: RunConfig, placement: Placement, pipeline: Pipeline, device: torch.device, steps: int
) -> Iterator[str]:
    """Data, length and a table of ranks and peers.

    Args:
        device: of rank 0.
        steps: of the whole run.
    """
    batch = config.data.global_batch
    yield (
        f"data   {pipeline.train_size:,} images of {pipeline.num_classes:,} classes to train on, "
        f"{pipeline.eval_size:,} to validate; batches of {batch:,}, {pipeline.steps_per_epoch:,} steps an epoch, "
        f"{steps:,} in all"
    )
    names = [name for name, _ in config.cohort]
    networks = [f"{peer.network}{'' if peer.learns else ', frozen'}" for _, peer in config.cohort]
    rows = []
    for group in placement.groups[:_ROWS]:
        rows_here = -(-batch // len(group.ranks))
        for place, k in enumerate(group.peers):
            shown = (_listed(group.ranks), f"{rows_here:,}") if place == 0 else ("", "")
            rows.append((*shown, names[k], networks[k]))
    header = ("ranks", "rows", "peer", "network")
    widths = [max(len(row[i]) for row in (header, *rows)) for i in range(len(header))]
    for row in (header, *rows):
        yield "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip()
    if len(placement.groups) > _ROWS:
        yield f"... and {len(placement.groups) - _ROWS} groups of ranks more"
    yield f"on     {_device(device)}, {config.precision.amp}{', compiled' * config.precision.compile}"


def _listed(ranks: Sequence[int]) -> str:
    """As 0-3, or 0, 2, 4 where they do not follow each other."""
    first, last = ranks[0], ranks[-1]
    if len(ranks) == last - first + 1:
        return str(first) if first == last else f"{first}-{last}"
    shown = ", ".join(str(rank) for rank in ranks[:4])
    return shown if len(ranks) <= 4 else f"{shown}, ... ({len(ranks)})"


def _device(device: torch.device) -> str:
    if device.type == "cuda":
        found = torch.cuda.get_device_properties(device)
        return f"{found.name} with {found.total_memory / 2**30:.0f} GiB"
    return f"the CPU, {torch.get_num_threads()} thread{'s' * (torch.get_num_threads() > 1)} a rank"

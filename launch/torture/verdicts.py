"""What must hold of a run that was disturbed, against the same run undisturbed."""

from __future__ import annotations

import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from data_pipelines import open_pipeline
from engine.config import RunConfig
from engine.reporting.tracking import read_metrics
from engine.safety import checkpoint, loading
from engine.safety.checkpoint import CheckpointError
from launch.torture.gang import Gang

WEIGHTS, MOMENTS, LINES = 1e-5, 1e-4, 1e-3
"""Relative tolerances where the number of ranks changes. A gradient near an optimum is a small difference of large
numbers, and so is the divergence of peers that agree."""

COUNTED, IMAGES = ("top1", "top5", "disagreement"), 0.11
"""There, figures that count images may differ by so many percent: two of 2,000, whose two best classes are as near."""


def problems_at_rest(gang: Gang, folder: Path, known: list[int], exact: bool, *, still_there: bool) -> list[str]:
    """What is wrong where all processes shall have ended, unless they are `still_there`, stopped.

    Args:
        known: steps of checkpoints that were damaged before.
    """
    problems = [] if still_there else [f"rank {rank} is still there" for rank in gang.workers()]
    problems += [text for step, text in damaged(gang.run).items() if step not in known]
    difference = _difference(read_metrics(folder / "undisturbed"), read_metrics(gang.run), exact, so_far=True)
    return problems + ([difference] if difference else [])


def damaged(run: Path) -> dict[int, str]:
    """What is wrong with each checkpoint that is not whole."""
    found = {}
    for step in checkpoint.steps_on_disk(run):
        try:
            loading.verify(checkpoint.folder_of(run, step))
        except CheckpointError as error:
            found[step] = str(error)
    return found


def _difference(
    wanted: list[dict[str, Any]], found: list[dict[str, Any]], exact: bool, so_far: bool = False
) -> str | None:
    """Of lines of metrics but for what a clock measured."""
    if len(found) > len(wanted) or (len(found) < len(wanted) and not so_far):
        return f"metrics.jsonl has {len(found)} lines, expected {len(wanted)}"
    for number, (line, other) in enumerate(zip(found, wanted, strict=False), 1):
        for key in ["step", *sorted(line.keys() | other.keys())]:
            one, two = line.get(key), other.get(key)
            if not key.startswith("speed/") and one != two and (exact or not _near(key, one, two)):
                return f"metrics.jsonl, line {number}: {key} is {one}, expected {two}"
    return None


def _near(key: str, one: Any, two: Any) -> bool:
    floats = isinstance(one, float) and isinstance(two, float)
    return floats and math.isclose(one, two, rel_tol=LINES, abs_tol=IMAGES if key.endswith(COUNTED) else 1e-5)


def verdicts(folder: Path, config: RunConfig, epochs: int, exact: bool) -> Iterator[tuple[str, str | None]]:
    """Each claim, and what is wrong with it."""
    run, undisturbed = folder / "disturbed", folder / "undisturbed"
    how = "equal to the last bit" if exact else f"equal to {WEIGHTS:g}, moments to {MOMENTS:g}"
    yield (
        f"weights, moments and averages of all peers: {how}",
        _state_difference(_final(undisturbed), _final(run), exact),
    )
    lines = read_metrics(undisturbed)
    how = "bit for bit" if exact else f"to {LINES:g}"
    problem = _difference(lines, read_metrics(run), exact)
    yield f"metrics.jsonl: {len(lines)} lines, no gap, no repeat, numbers equal {how}", problem
    yield f"the order shows every sample once in each of {epochs} epochs", _repeats(config, epochs)
    here, there = (sorted(path.name for path in (one / "checkpoints").iterdir()) for one in (run, undisturbed))
    problem = None if here == there else f"checkpoints: {', '.join(here)}; expected {', '.join(there)}"
    yield f"checkpoints: {', '.join(there)}, nothing left over", problem
    yield "every checkpoint whole", next(iter(damaged(run).values()), None)


def _final(run: Path) -> dict[str, Any]:
    """Everything in the newest checkpoint: `file/key/key` -> tensor or plain value."""
    manifest, _ = loading.newest(run)
    assert manifest
    flat: dict[str, Any] = {"step": manifest.step, "best": manifest.best and manifest.best.step}

    def walk(value: Any, key: str) -> None:
        if isinstance(value, dict | list | tuple):
            for name, inner in value.items() if isinstance(value, dict) else enumerate(value):
                walk(inner, f"{key}/{name}")
        else:
            flat[key] = value

    for name in manifest.files:
        walk(loading.read_state(checkpoint.folder_of(run, manifest.step), name), name)
    return flat


def _state_difference(wanted: dict[str, Any], found: dict[str, Any], exact: bool) -> str | None:
    """Tensors may differ in norm to tolerance, other values not at all."""
    for key in sorted(wanted.keys() | found.keys()):
        one, two = found.get(key), wanted.get(key)
        relative = 0.0 if exact else MOMENTS if "/optimizer/" in key else WEIGHTS
        if isinstance(one, Tensor) and isinstance(two, Tensor) and one.shape == two.shape:
            off = float((one.double() - two.double()).norm())
            if off > relative * float(two.double().norm()) or (exact and not torch.equal(one, two)):
                return f"{key}: off by {off:.1e} in norm"
        elif isinstance(one, Tensor) or isinstance(two, Tensor) or one != two:
            return f"{key}: {one} instead of {two}"
    return None


def _repeats(config: RunConfig, epochs: int) -> str | None:
    """Samples that the order of an epoch shows twice or never."""
    pipeline = open_pipeline(config.data, config.seed, torch.device("cpu"))
    try:
        for epoch in range(epochs):
            batches = pipeline.train(epoch, 0, slice(0, config.data.global_batch))
            seen = torch.cat([batch.ids for batch in batches]).bincount(minlength=pipeline.train_size)
            if not bool((seen == 1).all()):
                return f"epoch {epoch}: {int((seen != 1).sum())} samples not seen exactly once"
    finally:
        pipeline.close()
    return None

"""Whether peers of one network are computed as one: as the config says, or by what is faster as the run starts."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from engine.cohort.cohort import Cohort, compute_together
from engine.cohort.together import Together, hindrance
from engine.config import ConfigError
from engine.files import read_text, write_json
from engine.training.step import blank, rehearse
from losses import Progress

FILE = "batch_peers.json"
"""In the run's folder: what was chosen, and on what. A run that goes on sums in the order in which it has begun."""

ROUNDS = 3


def settle_batching(
    cohort: Cohort, progress: Progress, folder: Path, say: Callable[[str], None], *, going_on: bool
) -> None:
    """Has the cohort compute its peers as `train.batch_peers` says.

    All ranks call this, and choose alike.

    Args:
        cohort: of which nothing changes but that.
        progress: of the run.
        folder: of the run, in which a choice is kept.
        say: told what `auto` has found.
        going_on: the run has steps behind it.

    Raises:
        ConfigError: on all ranks: `on`, and a network cannot be computed for several peers at once.
    """
    wanted = cohort.config.train.batch_peers
    if wanted == "off":
        return
    together = cohort.together or compute_together(cohort)
    reason = hindrance(cohort.config, cohort.placement) or _of_any_rank(_fails(cohort, together))
    if reason is not None and wanted == "on":
        raise ConfigError(f"train.batch_peers = on: {reason}; expected off or auto")
    if wanted == "on":
        return
    if reason is not None:
        say(f"train.batch_peers = auto: each peer by itself, since {reason}")
        return
    known = _known(cohort, folder)
    if known is None and going_on:
        known = False, "the run has begun that way"
    if known is None:
        alone, at_once = _seconds(cohort, progress, together)
        why = f"forward and backward take {1000 * alone:.1f} ms one by one, {1000 * at_once:.1f} as one"
        known = at_once < alone, f"{why}, a ratio of {alone / at_once:.2f}"
        if cohort.placement.rank == 0:
            write_json(folder / FILE, {"device": cohort.device.type, "together": known[0], "why": known[1]})
    cohort.together = together if known[0] else None
    if cohort.together:
        cohort.together.take_over(cohort.residents)
    say(f"train.batch_peers = auto: {'peers as one network' if known[0] else 'each peer by itself'}: {known[1]}")


def _fails(cohort: Cohort, together: Together | None) -> str | None:
    if together is None:
        return None
    views = cohort.views_of(blank(cohort, 2))
    try:
        together.check(views)
    except ValueError as error:
        return str(error)
    return None


def _of_any_rank(reason: str | None) -> str | None:
    """Ranks that hold the same peers must average the gradients of the same modules."""
    everyone: list[str | None] = [None] * dist.get_world_size()
    dist.all_gather_object(everyone, reason)
    return next((found for found in everyone if found is not None), None)


def _known(cohort: Cohort, folder: Path) -> tuple[bool, str] | None:
    """What rank 0 finds to have been chosen. Raises: ConfigError, on all ranks."""
    told: list[Any] = [None, None]
    if cohort.placement.rank == 0:
        path = folder / FILE
        try:
            found = json.loads(read_text(path))
            told[0] = (bool(found["together"]), str(found["why"])) if found["device"] == cohort.device.type else None
        except FileNotFoundError:
            pass
        except (OSError, ValueError, TypeError, KeyError) as error:
            told[1] = (
                f"{path}: not what train.batch_peers = auto has chosen: {error}; expected the file as it was "
                "written, without which the run cannot go on bit for bit"
            )
    dist.broadcast_object_list(told, src=0)
    known, failure = told
    if failure:
        raise ConfigError(failure)
    return known


def _seconds(cohort: Cohort, progress: Progress, together: Together | None) -> tuple[float, float]:
    """The least seconds of a pass forward and backward on the slowest rank, each peer by itself and as one; in turn,
    after a first try."""
    least = [float("inf"), float("inf")]
    with torch.random.fork_rng([cohort.device.index] if cohort.device.type == "cuda" else []):
        for done in range(ROUNDS + 1):
            for way, used in enumerate((None, together)):
                cohort.together = used
                _wait(cohort.device)
                begin = time.perf_counter()
                rehearse(cohort, progress)
                _wait(cohort.device)
                if done:
                    least[way] = min(least[way], time.perf_counter() - begin)
    agreed = torch.tensor(least, dtype=torch.float64, device=cohort.device)
    dist.all_reduce(agreed, dist.ReduceOp.MAX)
    alone, at_once = agreed.tolist()
    return alone, at_once


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)

"""Whether peers of one network are computed as one: as the config says, or by what is faster as the run starts."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from pathlib import Path

import torch

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

    Args:
        cohort: of which nothing changes but that.
        progress: of the run.
        folder: of the run, in which a choice is kept.
        say: told what `auto` has found.
        going_on: the run has steps behind it.

    Raises:
        ConfigError: `on`, and a network cannot be computed for several peers at once.
    """
    wanted = cohort.config.train.batch_peers
    if wanted == "off":
        return
    reason = hindrance(cohort.config, cohort.placement)
    together = cohort.together or compute_together(cohort)
    if together is not None:
        reason = _fails(cohort, together)
    if reason is not None and wanted == "on":
        raise ConfigError(f"train.batch_peers = on: {reason}; expected off or auto")
    if wanted == "on":
        return
    if reason is not None:
        cohort.together = None
        say(f"train.batch_peers = auto: each peer by itself, since {reason}")
        return
    known = _known(folder, cohort.device.type)
    if known is None and going_on:
        known = False, "the run has begun that way"
    if known is None:
        alone, at_once = _seconds(cohort, progress, together)
        why = f"forward and backward take {1000 * alone:.1f} ms one by one, {1000 * at_once:.1f} as one"
        known = at_once < alone, f"{why}, a ratio of {alone / at_once:.2f}"
        write_json(folder / FILE, {"device": cohort.device.type, "together": known[0], "why": known[1]})
    cohort.together = together if known[0] else None
    say(f"train.batch_peers = auto: {'peers as one network' if known[0] else 'each peer by itself'}: {known[1]}")


def _fails(cohort: Cohort, together: Together) -> str | None:
    views = cohort.views_of(blank(cohort, 2))
    try:
        together.check(views)
    except ValueError as error:
        return str(error)
    return None


def _known(folder: Path, device: str) -> tuple[bool, str] | None:
    path = folder / FILE
    try:
        found = json.loads(read_text(path))
        return (bool(found["together"]), str(found["why"])) if found["device"] == device else None
    except FileNotFoundError:
        return None
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise ConfigError(
            f"{path}: not what train.batch_peers = auto has chosen: {error}; expected the file as it was "
            "written, without which the run cannot go on bit for bit"
        ) from None


def _seconds(cohort: Cohort, progress: Progress, together: Together | None) -> tuple[float, float]:
    """The least seconds of a pass forward and backward, each peer by itself and as one; in turn, after a first try."""
    least = {False: float("inf"), True: float("inf")}
    with torch.random.fork_rng([cohort.device.index] if cohort.device.type == "cuda" else []):
        for done in range(ROUNDS + 1):
            for way in least:
                cohort.together = together if way else None
                _wait(cohort.device)
                begin = time.perf_counter()
                rehearse(cohort, progress)
                _wait(cohort.device)
                if done:
                    least[way] = min(least[way], time.perf_counter() - begin)
    return least[False], least[True]


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)

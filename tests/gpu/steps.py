"""What the tests look at inside a rank. The device is an argument: here a CPU may stand in for the GPU."""

from __future__ import annotations

import contextlib
import os
import traceback
from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from data_pipelines import Batch
from engine.cohort.cohort import Cohort
from engine.config import RunConfig
from engine.ranks.collectives import Launch, choose_device, start
from engine.ranks.planning.choosing import plan
from engine.training.meter import Meter
from engine.training.step import train_step
from engine.training.timing import Clock
from losses import Progress
from losses.capabilities import HeldOutSurveys
from tests.engine.stepping import CLASSES, IMAGE_SIZE, STEPS_PER_EPOCH, config_of, global_batch, state
from tests.gpu.cases import Case

LEARNING = 40
"""Steps of the longest look."""
FIRST_WATCHED, LAST_WATCHED = 5, 12

CPU = torch.device("cpu")


@contextlib.contextmanager
def world(device: str) -> Iterator[torch.device]:
    """This rank's device, in a process group that its tensors and the CPU's may use; products and convolutions are
    exact, and come out the same each time."""
    launch = Launch.from_environment()
    chosen = choose_device(device, launch)
    exactly()
    start(launch, chosen)
    try:
        yield chosen
    finally:
        dist.destroy_process_group()


def exactly() -> None:
    """No TF32, and no choice of algorithms."""
    torch.backends.cudnn.allow_tf32 = False
    torch.set_float32_matmul_precision("highest")
    torch.backends.cudnn.benchmark = False
    torch.backends.cudnn.deterministic = True


def a_config(case: Case, **precision: Any) -> RunConfig:
    """The run of a case, in float32 unless it says otherwise."""
    sections = {**case.sections, "precision": {"tf32": False, **precision}}
    return config_of(case.method, case.networks or case.peers, **sections)


def a_cohort(config: RunConfig, device: torch.device) -> Cohort:
    """This rank's part of the cohort, on a device."""
    placement = plan(config, dist.get_world_size(), dist.get_rank())
    cohort = Cohort(
        config,
        placement,
        device,
        num_classes=CLASSES,
        channels=1,
        image_size=IMAGE_SIZE,
        steps_per_epoch=STEPS_PER_EPOCH,
    )
    cohort.prepare(torch.cat([global_batch(config, step).targets for step in range(LEARNING)]))
    return cohort


def on_the_device(cohort: Cohort, step: int) -> list[Batch]:
    """The micro-batches of this rank's rows of a global batch, there already."""
    whole, device = global_batch(cohort.config, step), cohort.device
    rows = cohort.placement.rows(cohort.config.data.global_batch)
    images = whole.images[rows].to(device)
    views = tuple((images + 0.1 * v).contiguous(memory_format=torch.channels_last) for v in cohort.views)
    mine = Batch(views, whole.targets[rows].to(device), whole.ids[rows].to(device))
    return mine.split([len(share.rows) for share in cohort.shares])


def train(cohort: Cohort, steps: int, watch_from: int | None = None) -> list[dict[str, float]]:
    """Trains, and gives the terms of each step; of a skipped one `skipped` is 1.

    Args:
        watch_from: the step from which on it is an error if the host waits for the device.
    """
    batches = [on_the_device(cohort, step) for step in range(steps)]
    meter, clock, found = Meter(cohort.placement, cohort.device), Clock(cohort.device), []
    surveyed = torch.tensor([[2.0, 0.5], [0.5, 1.0]], dtype=torch.float64, device=cohort.device)
    try:
        for step, pieces in enumerate(batches):
            method = cohort.method
            if step == 1 and isinstance(method, HeldOutSurveys) and method.held_out(cohort.config.method):
                method.begin_epoch(surveyed)
            if step == watch_from:
                torch.cuda.set_sync_debug_mode("error")
            outcome = train_step(cohort, pieces, Progress(step, STEPS_PER_EPOCH, 8), clock)
            meter.add(outcome)
            found.append(outcome)
    finally:
        if watch_from is not None:
            torch.cuda.set_sync_debug_mode("default")
    meter.read()
    clock.read()
    return [
        {"skipped": outcome.skipped.item(), **{f"{k}/{name}": x.item() for (k, name), x in outcome.terms.items()}}
        for outcome in found
    ]


def misplaced(cohort: Cohort) -> list[str]:
    """The tensors of optimisers' states that do not lie with their parameters, and parameters and buffers of peers,
    averages and the method that do not lie on the cohort's device."""
    found = []
    for i, optimizer in enumerate(cohort.optimizers()):
        for p, remembered in optimizer.state.items():
            found += [
                f"optimizer {i}: {name} on {x.device}, the parameter on {p.device}"
                for name, x in remembered.items()
                if isinstance(x, Tensor) and x.device != p.device
            ]
    modules = [cohort.shared, *(m for r in cohort.residents.values() for m in (r.peer, r.ema) if m is not None)]
    for module in modules:
        tensors = [*module.named_parameters(), *module.named_buffers()]
        found += [f"{name} on {x.device}" for name, x in tensors if x.device != cohort.device]
    return found


def three_steps(case: Case, device: torch.device) -> dict[str, Any]:
    """States and terms after three steps on the device."""
    cohort = a_cohort(a_config(case), device)
    terms = train(cohort, 3)
    return {
        "state": {name: x.cpu() for name, x in state(cohort).items()},
        "terms": terms,
        "misplaced": misplaced(cohort),
    }


def watched_steps(case: Case, device: torch.device) -> str:
    """Whatever has made the host wait."""
    cohort = a_cohort(a_config(case), device)
    try:
        train(cohort, LAST_WATCHED, FIRST_WATCHED if device.type == "cuda" else None)
    except RuntimeError:
        return traceback.format_exc()
    return ""


def learning(case: Case, device: torch.device, amp: str) -> dict[str, Any]:
    """Cross-entropies of the peers in the first five and the last five of forty steps; what is not finite at the end;
    updates skipped."""
    cohort = a_cohort(a_config(case, amp=amp), device)
    steps = train(cohort, LEARNING)
    entropies = [[x for name, x in step.items() if name.endswith("/ce")] for step in steps]
    made = [sum(own) / len(own) for own, step in zip(entropies, steps, strict=True) if not step["skipped"]]
    broken = [name for name, x in state(cohort).items() if x.is_floating_point() and not x.isfinite().all()]
    return {
        "first": sum(made[:5]) / 5,
        "last": sum(made[-5:]) / 5,
        "broken": broken,
        "skipped": sum(step["skipped"] for step in steps),
    }


def look_at(case: Case, device: str) -> dict[str, Any]:
    """All that is to be seen of a case, in one world; where something fails, its traceback."""
    looks: dict[str, Callable[[torch.device], Any]] = {
        "device": lambda where: three_steps(case, where),
        "cpu": lambda _: three_steps(case, CPU),
        "waits": lambda where: watched_steps(case, where),
        "bf16": lambda where: learning(case, where, "bf16"),
        **({"fp16": lambda where: learning(case, where, "fp16")} if case.fp16 else {}),
    }
    found: dict[str, Any] = {}
    with world(device) as where:
        for name, look in looks.items():
            try:
                found[name] = look(where)
            except Exception:
                found[name] = traceback.format_exc()
    return found


def spread_steps(cases: dict[str, Case], device: str, environment: dict[str, str]) -> dict[str, Any]:
    """This rank's state of each case after three steps, a peer on each rank; where it fails, the traceback."""
    os.environ.update(environment)
    found: dict[str, Any] = {}
    with world(device) as where:
        for name, case in cases.items():
            cohort = a_cohort(a_config(case), where)
            train(cohort, 3)
            found[name] = {key: x.cpu() for key, x in state(cohort).items()}
    return found

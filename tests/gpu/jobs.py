"""What the tests of whole runs look at: each job starts worlds of its own and gives what was found there."""

from __future__ import annotations

import importlib.util
import os
import shutil
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch

from data_pipelines import DataConfig, open_pipeline
from engine.cohort.cohort import open_cohort
from engine.cohort.precision import set_precision
from engine.config import RunConfig
from engine.ranks.planning.choosing import plan
from engine.safety import checkpoint, loading
from engine.safety.checkpoint import Standing
from engine.safety.saving import Saver
from engine.training.evaluation import evaluate_cohort
from engine.training.meter import Meter
from engine.training.step import train_step
from engine.training.timing import Clock
from launch.bench.gpu.disk import make_photos
from losses import Progress
from tests.engine.stepping import STEPS_PER_EPOCH, state
from tests.gpu.cases import CASES, Case
from tests.gpu.steps import CPU, a_cohort, a_config, on_the_device, spread_steps, train, world
from tests.runs import small_run, train_here, weights
from tests.worlds import run_ranks

SPREAD = ("dml", "one", "mcl_global", "codistillation", "lmcl", "lmcl_sharded")
"""Cases whose ranks talk to each other in different ways."""

SHARED_NCCL = {"NCCL_MULTI_RANK_GPU_ENABLE": "1", "NCCL_NVLS_ENABLE": "0", "NCCL_MAX_CTAS": "4"}

RESUMED: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "dml": ({"name": "dml"}, {"train": {"ema_decay": 0.9}}),
    "kdcl_general": ({"name": "kdcl", "ensemble": "general"}, {"data": {"held_out": 0.1}}),
    "lmcl": ({"name": "lmcl", "width": 16, "meta_interval": 2}, {}),
}


def spread(environment: dict[str, str], tiny: Path, folder: Path, device: str) -> list[dict[str, Any]] | None:
    """What each of two ranks holds after three steps of each case; None where NCCL takes no two ranks on one GPU."""
    if environment and device == "cuda" and torch.cuda.nccl.version() < (2, 30):
        return None
    return run_ranks(2, spread_steps, {name: CASES[name] for name in SPREAD}, device, environment)


def resume(name: str, tiny: Path, folder: Path, device: str) -> tuple[dict[str, Any], dict[str, Any]]:
    """The weights of a run of two epochs, and those of one that went on after the first."""
    method, sections = RESUMED[name]
    precision = {"tf32": False}
    config = small_run(tiny, folder, method, device=device, precision=precision, checkpoint={"keep": 9}, **sections)
    run_ranks(1, train_here, config)
    whole = weights(folder)
    first, *later = checkpoint.steps_on_disk(folder)
    for step in later:
        shutil.rmtree(checkpoint.folder_of(folder, step))
    run_ranks(1, train_here, config)
    assert checkpoint.steps_on_disk(folder) == [first, *later]
    return whole, weights(folder)


def save_beside(folder: Path, device: str) -> dict[str, Any]:
    """Saves after five steps, and trains on while it is written."""
    with world(device) as where:
        cohort = a_cohort(a_config(CASES["dml_ema"]), where)
        train(cohort, 5)
        saver = Saver(folder, cohort, print)
        saver.save(Standing(5, None, 0, {}, 0), keep=1)
        at_the_save = {
            f"{r.name}/{name}": x.cpu().clone()
            for r in cohort.residents.values()
            for name, x in r.whole.state_dict().items()
        }
        written_at_once = not saver.writing
        train(cohort, 10)
        saver.wait()
        saver.close()
        manifest, damaged = loading.newest(folder)
        later = next(iter(cohort.residents.values())).whole.state_dict()
        return {
            "saved": weights(folder),
            "then": at_the_save,
            "moved": any(
                not torch.equal(x.cpu(), y) for x, y in zip(later.values(), at_the_save.values(), strict=False)
            ),
            "step": manifest and manifest.step,
            "damaged": damaged,
            "written at once": written_at_once,
        }


def evaluate_on(config: RunConfig, device: str) -> dict[str, Any]:
    """Scores of the same networks on the device and on the CPU, and a training batch of both."""
    found: dict[str, Any] = {}
    with world(device) as where:
        pipelines = {"device": open_pipeline(config.data, 0, where), "cpu": open_pipeline(config.data, 0, CPU)}
        cohorts = {
            name: open_cohort(pipeline, config, plan(config, 1, 0), where if name == "device" else CPU)
            for name, pipeline in pipelines.items()
        }
        networks = cohorts["cpu"].networks()
        # So that answers differ from image to image: statistics of images that were seen.
        for batch in pipelines["cpu"].train(0, 0, slice(0, 24)):
            for network in networks.values():
                network(batch.images)
        for k, network in cohorts["device"].networks().items():
            network.load_state_dict(networks[k].state_dict())
        for name, pipeline in pipelines.items():
            found[name] = evaluate_cohort(cohorts[name], pipeline)[0]
            batch = next(iter(pipeline.train(1, 0, slice(0, 24), (0, 1))))
            found[f"batch, {name}"] = [x.cpu() for x in (*batch.views, batch.targets, batch.ids)]
    return found


AUGMENTED: dict[str, Any] = {
    "augmentation": {
        "policy": {"name": "trivial_augment"},
        "cutout": 8,
        "erasing": {"prob": 0.5, "mode": "pixel"},
        "mixing": {"mixup_alpha": 0.2, "cutmix_alpha": 1.0},
        "label_smoothing": 0.1,
    }
}
"""Much at once, and targets that are probabilities."""


def evaluation(sections: dict[str, Any], tiny: Path, folder: Path, device: str) -> dict[str, Any]:
    """See `evaluate_on`."""
    config = small_run(tiny, folder, precision={"tf32": False}, evaluation={"batch": 10}, **sections)
    return run_ranks(1, evaluate_on, config, device)[0]


def saving(tiny: Path, folder: Path, device: str) -> dict[str, Any]:
    """See `save_beside`."""
    return run_ranks(1, save_beside, folder, device)[0]


def pipeline_steps(config: RunConfig, device: str) -> list[float]:
    """Trains on the images of the pipeline for 40 steps; from step 5 on, across epochs, it is an error if the host
    waits. Gives the mean cross-entropy of each step."""
    with world(device) as where:
        pipeline, placement = open_pipeline(config.data, config.seed, where), plan(config, 1, 0)
        cohort = open_cohort(pipeline, config, placement, where)
        meter, clock, losses = Meter(placement, where), Clock(where), []
        try:
            for step in range(40):
                epoch, within = divmod(step, pipeline.steps_per_epoch)
                if not within:
                    batches = pipeline.train(epoch, 0, placement.rows(config.data.global_batch), cohort.views)
                if step == 5 and where.type == "cuda":
                    torch.cuda.set_sync_debug_mode("error")
                progress = Progress(step, pipeline.steps_per_epoch, config.train.epochs_of(pipeline.steps_per_epoch))
                outcome = train_step(cohort, [next(batches)], progress, clock)
                meter.add(outcome)
                losses.append(torch.stack([x for (_, name), x in outcome.terms.items() if name == "ce"]).mean())
        finally:
            if where.type == "cuda":
                torch.cuda.set_sync_debug_mode("default")
        return [loss.item() for loss in losses]


def through_the_pipeline(amp: str, tiny: Path, folder: Path, device: str, **sections: Any) -> list[float]:
    """See `pipeline_steps`."""
    config = small_run(tiny, folder, precision={"amp": amp}, train={"epochs": 8}, **sections)
    return run_ranks(1, pipeline_steps, config, device)[0]


def compiled_steps(name: str, device: str) -> dict[str, Any]:
    """Terms of three steps of networks that are compiled and of others that are not."""
    os.environ["TORCHINDUCTOR_COMPILE_THREADS"] = "4"  # several such jobs run beside each other
    with world(device) as where:
        found = {}
        for kind, on in (("eager", False), ("compiled", True)):
            torch._dynamo.reset()
            found[kind] = train(a_cohort(a_config(CASES[name], compile=on), where), 3)
    return found


def compiled(name: str, tiny: Path, folder: Path, device: str) -> dict[str, Any]:
    """See `compiled_steps`."""
    return run_ranks(1, compiled_steps, name, device, timeout=240)[0]


def pixels_of(folder: Path, decoders: tuple[str, str], device: str) -> list[list[torch.Tensor]]:
    """The first training batch and the validation images, of each decoder, normalised."""
    found = []
    with world(device) as where:
        for decoder in decoders:
            data = DataConfig.model_validate(
                {
                    "dataset": "image_folder",
                    "root": str(folder),
                    "global_batch": 16,
                    "image": {"size": 64, "resize": 72},
                    "decoding": {"decoder": decoder},
                }
            )
            pipeline = open_pipeline(data, 0, where)
            batches = [next(iter(pipeline.train(0, 0, slice(0, 16)))), *pipeline.evaluate(0, 1, 16)]
            found.append([x.cpu() for batch in batches for x in (batch.images, batch.targets, batch.ids)])
            pipeline.close()
    return found


def decoders(tiny: Path, folder: Path, device: str) -> list[list[torch.Tensor]] | None:
    """See `pixels_of`; None without DALI."""
    if importlib.util.find_spec("nvidia") is None or importlib.util.find_spec("nvidia.dali") is None:
        return None
    make_photos(folder, 16)
    return run_ranks(1, pixels_of, folder, ("mixed" if device == "cuda" else "cpu", "cpu"), device)[0]


SYNCHRONISED: dict[str, Case] = {
    "dml": CASES["dml"],
    "normalisation with activation": Case(
        {"name": "dml"}, networks=[{"network": "timm/test_efficientnet", "copies": 2}], tolerance=2e-3
    ),
    "one": CASES["one"],
    "dcm": CASES["dcm"],
}
"""Networks, auxiliary classifiers and gates whose BatchNorm sees the rows of all replicas."""


def replicas_in_step(case: Case, device: str) -> dict[str, torch.Tensor]:
    """The state after three steps of a cohort that is colocated on as many ranks as there are."""
    with world(device) as where:
        ranks = torch.distributed.get_world_size()
        sections = {**case.sections, "train": {"sync_bn": ranks > 1}, "placement": {"kind": "colocated"}}
        cohort = a_cohort(a_config(replace(case, sections=sections)), where)
        train(cohort, 3)
        return {name: x.cpu() for name, x in state(cohort).items()}


def synchronised(name: str, tiny: Path, folder: Path, device: str) -> tuple[dict[str, Any], dict[str, Any]]:
    """The states of a cohort whose two replicas share their statistics, and of one that is alone with all rows."""
    case = SYNCHRONISED[name]
    return run_ranks(2, replicas_in_step, case, device)[0], run_ranks(1, replicas_in_step, case, device)[0]


def twins(case: Case, device: str) -> dict[str, float]:
    """The terms of peers that show the same, in the default setting of TF32."""
    with world(device) as where:
        config = a_config(case, tf32=True)
        set_precision(config, where)
        cohort = a_cohort(config, where)
        [batch], progress = on_the_device(cohort, 0), Progress(1, STEPS_PER_EPOCH, 8)
        own = dict(cohort.forward(batch, progress, 0, range(2)))
        signals = cohort.share(dict.fromkeys(own, own[0]), batch, cohort.shares[0])
        terms = cohort.objective([0, 1], signals, batch.targets, progress, 0)
        return {f"{k}/{name}": x.item() for (k, name), x in terms.items()}


def exact_losses(name: str, tiny: Path, folder: Path, device: str) -> dict[str, float]:
    """See `twins`."""
    return run_ranks(1, twins, CASES[name], device)[0]


Job = Callable[[Path, Path, str], Any]

JOBS: dict[str, Job] = {
    **{f"compiled {name}": partial(compiled, name) for name in ("dml", "lmcl", "pcl")},
    **{f"pipeline {amp}": partial(through_the_pipeline, amp) for amp in ("float32", "bf16", "fp16")},
    "two ranks over gloo": partial(spread, {}),
    "two ranks over NCCL": partial(spread, SHARED_NCCL),
    **{f"resumed {name}": partial(resume, name) for name in RESUMED},
    **{f"synchronised {name}": partial(synchronised, name) for name in SYNCHRONISED},
    **{f"twins {name}": partial(exact_losses, name) for name in ("mcl_batch", "mcl_global")},
    "saving": saving,
    "pipeline, augmented": partial(through_the_pipeline, "bf16", data=AUGMENTED),
    "evaluation": partial(evaluation, {}),
    "evaluation, augmented": partial(evaluation, {"data": AUGMENTED}),
    "decoders": decoders,
}
"""The longest first. Each is given the folder of the small data set, one of its own, and the device."""

"""What only a GPU can show. Run with `pytest -m gpu`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

from data_pipelines import open_pipeline
from engine.cohort.cohort import Cohort
from engine.config import RunConfig
from engine.ranks.collectives import Launch, choose_device, start
from engine.ranks.placement import plan
from engine.training.meter import Meter
from engine.training.step import train_step
from engine.training.timing import Clock
from losses import Progress
from models.stages import plain_state
from tests.runs import assert_same_weights, small_run
from tests.worlds import run_ranks

pytestmark = pytest.mark.gpu

EXACT = {"tf32": False}


def _steps(config: RunConfig, steps: int, watch_from: int | None = None) -> tuple[dict[str, torch.Tensor], list[float]]:
    """Trains; gives the residents' weights on the CPU and the mean loss of the peers here at each step.

    From step `watch_from` on whatever makes the host wait for the device is an error.
    """
    launch = Launch.from_environment()
    device = choose_device(config.device, launch)
    torch.backends.cudnn.allow_tf32 = config.precision.tf32
    torch.set_float32_matmul_precision("high" if config.precision.tf32 else "highest")
    start(launch, device)
    try:
        pipeline = open_pipeline(config.data, config.seed, device)
        placement = plan(config, launch.world, launch.rank)
        cohort = Cohort.on(pipeline, config, placement, device)
        meter, clock, losses = Meter(placement, device), Clock(device), []
        rows = placement.rows(config.data.global_batch)
        done = 0
        while done < steps:
            for batch in pipeline.train(done // pipeline.steps_per_epoch, 0, rows, cohort.views):
                if done == watch_from:
                    torch.cuda.set_sync_debug_mode("error")
                progress = Progress(done, pipeline.steps_per_epoch, config.train.epochs)
                terms, skipped = train_step(cohort, [batch], progress, clock)
                meter.add(terms, skipped)
                losses.append(torch.stack([x.reshape(()) for (_, name), x in terms.items() if name == "ce"]).mean())
                done += 1
                if done == steps:
                    break
        torch.cuda.set_sync_debug_mode("default")
        state = {f"{k}/{n}": x.cpu() for k, r in cohort.residents.items() for n, x in plain_state(r.whole).items()}
        return state, [loss.item() for loss in losses]
    finally:
        dist.destroy_process_group()


def _config(tiny: Path, folder: Path, device: str, amp: str = "float32", **sections: Any) -> RunConfig:
    return small_run(tiny, folder, device=device, precision={"amp": amp, **EXACT}, **sections)


@pytest.mark.parametrize("method", ["independent", "dml"])
def test_three_steps_on_the_gpu_equal_those_on_the_cpu(tiny: Path, tmp_path: Path, method: str) -> None:
    (gpu, _), (cpu, _) = (
        run_ranks(1, _steps, _config(tiny, tmp_path, device, method={"name": method}), 3)[0]
        for device in ("cuda", "cpu")
    )
    assert_same_weights(gpu, cpu, 1e-3)


@pytest.mark.parametrize("amp", ["float32", "bf16", "fp16"])
def test_the_hot_loop_never_waits_for_the_device(tiny: Path, tmp_path: Path, amp: str) -> None:
    _, losses = run_ranks(1, _steps, _config(tiny, tmp_path, "cuda", amp, train={"epochs": 9}), 40, 5)[0]
    assert losses[-1] < losses[0]


def test_two_ranks_may_share_one_gpu(tiny: Path, tmp_path: Path) -> None:
    spread = run_ranks(2, _steps, _config(tiny, tmp_path, "cuda"), 3)
    colocated, _ = run_ranks(1, _steps, _config(tiny, tmp_path, "cuda"), 3)[0]
    assert_same_weights({name: x for state, _ in spread for name, x in state.items()}, colocated, 1e-4)


def test_compiled_networks_give_the_losses_of_eager_ones(tiny: Path, tmp_path: Path) -> None:
    eager, compiled = (
        run_ranks(1, _steps, small_run(tiny, tmp_path, precision={"compile": on, **EXACT}), 3, timeout=400)[0][1]
        for on in (False, True)
    )
    assert compiled == pytest.approx(eager, rel=1e-3)

"""The loop: steps, lines of metrics, evaluations and checkpoints, from wherever the run stands to its end."""

from __future__ import annotations

import sys
import time
from datetime import datetime
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from data_pipelines import DataError, Pipeline, open_pipeline
from engine import checkpoint
from engine.checkpoint import Best, CheckpointError, Manifest
from engine.cohort import Cohort
from engine.collectives import Launch, choose_device, start
from engine.config import RunConfig
from engine.evaluation import evaluate_cohort, survey
from engine.files import write_json
from engine.guards import check_same_rows, check_same_weights
from engine.meter import Meter
from engine.placement import Placement
from engine.preflight import check
from engine.step import settle, train_step
from engine.timing import Clock
from engine.tracking import Tracker, record_start
from losses import Progress


class TrainingDivergedError(RuntimeError):
    """Too many updates in a row had to be skipped."""


def train(config: RunConfig, launch: Launch, *, fresh: bool = False) -> Path:
    """Trains the cohort to the end of its last epoch, going on from the newest whole checkpoint if there is one.

    Args:
        fresh: start over; a folder of an earlier run is moved aside.

    Returns:
        The run's folder.

    Raises:
        ConfigError: before anything is started.
        CheckpointError: on all ranks, where one of them cannot use the checkpoint.
        TrainingDivergedError: on all ranks at the same step.
    """
    placement = check(config, launch, fresh=fresh)
    device = choose_device(config.device, launch)
    _set_precision(config, device)
    start(launch, device)
    try:
        if fresh:
            # Not before: another rank may still be looking at what lies there.
            if launch.rank == 0:
                _move_aside(config)
            dist.barrier()
        pipeline = open_pipeline(config.data, config.seed, device)
        try:
            run = _Run(config, placement, device, pipeline)
            try:
                run.to_the_end()
            except DataError as error:
                if launch.rank:  # one rank alone meets a broken file; the others only see that it is gone
                    print(f"error: rank {launch.rank}: {error}", file=sys.stderr, flush=True)
                raise
            finally:
                if run.tracker:
                    run.tracker.close()
        finally:
            pipeline.close()
        dist.barrier()
    finally:
        dist.destroy_process_group()
    return config.folder


def _move_aside(config: RunConfig) -> None:
    if config.folder.exists():
        aside = config.folder.with_name(f"{config.folder.name}.{datetime.now():%Y%m%d-%H%M%S-%f}")
        config.folder.rename(aside)
        print(f"the earlier run is now in {aside}", file=sys.stderr)


def _set_precision(config: RunConfig, device: torch.device) -> None:
    if config.precision.compile:
        # The limit counts all modules that are compiled in place, in training and in evaluation.
        torch._dynamo.config.recompile_limit = 16 * len(config.peers)
    if device.type == "cuda":
        torch.backends.cudnn.benchmark = True
        torch.backends.cudnn.allow_tf32 = config.precision.tf32
        torch.set_float32_matmul_precision("high" if config.precision.tf32 else "highest")


class _Run:
    """One rank's part of a run."""

    def __init__(self, config: RunConfig, placement: Placement, device: torch.device, pipeline: Pipeline) -> None:
        self.config, self.placement, self.device, self.pipeline = config, placement, device, pipeline
        self.steps_per_epoch = pipeline.steps_per_epoch
        self.steps = config.train.epochs * self.steps_per_epoch
        self.cohort = Cohort.on(pipeline, config, placement, device)
        self.meter = Meter(placement, device)
        self.step = 0
        self.best: Best | None = None
        self.tracker: Tracker | None = None
        self._resume()
        if self.step < self.steps and self.cohort.averages_gradients:
            share = config.data.global_batch // placement.replicas // config.train.accumulation
            settle(self.cohort, share, Progress(self.step, self.steps_per_epoch, config.train.epochs))
        self.clock = Clock(device)
        self._last_line = (time.perf_counter(), self.step)

    def _resume(self) -> None:
        first = self.placement.rank == 0
        found: list[Any] = list(checkpoint.newest(self.config.folder)) if first else [None, None]
        dist.broadcast_object_list(found, src=0)
        manifest: Manifest | None = found[0]
        if manifest is not None:
            self._load(manifest)
            self.step, self.best = manifest.step, manifest.best
            self.meter.in_a_row.fill_(manifest.in_a_row)
        elif self.cohort.meeting is not None:
            self.cohort.meeting.start_over()
        if first:
            record_start(self.config, self.placement.world)
            write_json(self.config.folder / "classes.json", self.pipeline.class_names)
            self.tracker = Tracker(self.config, self.step, self.steps)
            for message in found[1]:
                self.tracker.say(f"not used: {message}")
            self.tracker.say(f"{self.config.title}: {self.config.method.name}, {self.placement}; {self.config.folder}")
            if self.step:
                state = "complete" if self.step >= self.steps else "going on"
                self.tracker.say(f"{state} at step {self.step} of {self.steps}, from its checkpoint")

    def _load(self, manifest: Manifest) -> None:
        failure = None
        try:
            checkpoint.load(self.config.folder, manifest, self.cohort)
        except (CheckpointError, OSError) as error:
            failure = str(error)
        failures: list[str | None] = [None] * self.placement.world
        dist.all_gather_object(failures, failure)
        for message in filter(None, failures):
            raise CheckpointError(message)

    def to_the_end(self) -> None:
        while self.step < self.steps:
            epoch, done = divmod(self.step, self.steps_per_epoch)
            if epoch and not done and self.cohort.method.held_out(self.config.method):
                self.cohort.method.begin_epoch(survey(self.cohort, self.pipeline))
                self.clock.restart()
            rows = self.placement.rows(self.config.data.global_batch)
            for batch in self.pipeline.train(epoch, done, rows, self.cohort.views):
                self.clock.mark("data")
                progress = Progress(self.step, self.steps_per_epoch, self.config.train.epochs)
                terms, skipped = train_step(
                    self.cohort, batch.split(self.config.train.accumulation), progress, self.clock
                )
                self.meter.add(terms, skipped)
                self.step += 1
                if self.tracker:
                    self.tracker.progress(self.step)
                self._report_and_save(batch.ids)

    def _report_and_save(self, ids: Tensor) -> None:
        """What is due after a step, in the order in which a kill between two of them loses nothing: a checkpoint comes
        after all lines up to its step."""
        config, step = self.config, self.step
        epoch, within = divmod(step, self.steps_per_epoch)
        ends_epoch, ends_run = within == 0, step == self.steps
        save = ends_run or (ends_epoch and epoch % config.checkpoint.every_epochs == 0)
        save |= config.checkpoint.every_steps is not None and step % config.checkpoint.every_steps == 0
        score = ends_run or (ends_epoch and epoch % config.evaluation.every_epochs == 0)

        if not (save or score or ends_epoch or within % config.log.every_steps == 0):
            return
        check_same_rows(self.cohort, ids, step)
        self._write_line()
        if ends_epoch:
            check_same_weights(self.cohort, step)
        if save or score:
            self.cohort.average_buffers()
        if score:
            top1 = self._evaluate()
            if self.best is None or top1 > self.best.top1:
                self.best, save = Best(step, top1), True
        if save:
            checkpoint.save(
                config.folder,
                self.cohort,
                step=step,
                best=self.best,
                in_a_row=int(self.meter.in_a_row.item()),
                keep=config.checkpoint.keep,
            )
        self.clock.restart()
        self._last_line = (time.perf_counter(), step)

    def _write_line(self) -> None:
        means, skipped, longest = self.meter.read()
        parts = self.clock.read()
        seconds, steps = time.perf_counter() - self._last_line[0], self.step - self._last_line[1]
        self._last_line = (time.perf_counter(), self.step)
        if self.tracker:
            names = [name for name, _ in self.config.cohort]
            terms = {f"train/{'cohort' if k is None else names[k]}/{term}": value for (k, term), value in means.items()}
            images_per_second = steps * self.config.data.global_batch / seconds
            self.tracker.write(
                self.step,
                {
                    "epoch": self.step / self.steps_per_epoch,
                    "lr": self.cohort.optimizers()[0].param_groups[0]["lr"],
                    **terms,
                    "train/skipped": skipped,
                    "speed/images_per_second": images_per_second,
                    **{f"speed/{part}_ms": 1000 * total / steps for part, total in parts.items()},
                },
            )
            loss = sum(value for (_, term), value in means.items() if term != "grad_norm") / len(self.placement.peers)
            self.tracker.progress(self.step, loss=f"{loss:.3f}", images=f"{images_per_second:.0f}/s")
            if skipped:
                self.tracker.say(f"step {self.step}: {skipped} updates skipped since the last line: non-finite numbers")
        if longest >= self.config.train.max_skipped:
            raise TrainingDivergedError(
                f"{longest} updates in a row met a non-finite loss or gradient, up to step {self.step}; the limit is "
                f"train.max_skipped = {self.config.train.max_skipped}. The last checkpoint is from before; try a "
                "smaller optimizer.lr, train.clip_norm, schedule.warmup_epochs or precision.amp = bf16"
            )

    def _evaluate(self) -> float:
        """Scores the cohort, and its averages where there are some. Returns the mean top-1 of the peers."""
        values = evaluate_cohort(self.cohort, self.pipeline)
        if self.tracker:
            self.tracker.write(self.step, {"epoch": self.step / self.steps_per_epoch, **values})
            shown = ", ".join(
                f"{key.split('/')[1]} {value:.2f}"
                for key, value in values.items()
                if key.endswith("/top1") and key[:3] == "val"
            )
            self.tracker.say(f"epoch {self.step // self.steps_per_epoch}: top-1 % {shown}")
        peers = [values[f"val/{name}/top1"] for name, _ in self.config.trained]
        return sum(peers) / len(peers)

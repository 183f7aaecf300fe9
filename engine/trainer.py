"""The loop: steps, lines of metrics, evaluations and checkpoints, from wherever the run stands to its end."""

from __future__ import annotations

import contextlib
import gc
import signal
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import replace
from datetime import datetime
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from data_pipelines import DataError, Pipeline, open_pipeline
from engine.cohort.cohort import Cohort
from engine.config import RunConfig
from engine.files import write_json, write_text
from engine.preflight import check
from engine.ranks.collectives import Launch, choose_device, limit_waiting, record_flights, start
from engine.ranks.heartbeat import heartbeat
from engine.ranks.placement import Placement
from engine.reporting.tracking import Tracker, record_start
from engine.safety import checkpoint, rollback
from engine.safety.checkpoint import Best, Manifest, Saver, Standing
from engine.safety.health import CODES, EXPLAINED, Collapse, LossWatch, Spike, collapsed, trouble, without_gradient
from engine.safety.preemption import Preemption
from engine.safety.rollback import GoBack, Rollback
from engine.training.evaluation import evaluate_cohort, survey
from engine.training.guards import check_same_rows, check_same_weights
from engine.training.meter import Meter, Reading
from engine.training.precision import set_precision
from engine.training.step import settle, train_step
from engine.training.timing import Clock
from losses import Progress


class TrainingDivergedError(RuntimeError):
    """Too many updates in a row had to be skipped, or numbers went wrong once more after the last rollback."""


def train(config: RunConfig, launch: Launch, *, fresh: bool = False, preempted: Path | None = None) -> bool:
    """Trains the cohort to the end of its last epoch, going on from the newest whole checkpoint if there is one.

    SIGUSR1, SIGTERM or SIGINT to any rank ends all of them early, with a checkpoint of the step that they are at.

    Args:
        fresh: start over; a folder of an earlier run is moved aside.
        preempted: where the name of the signal is written if one ended the run early.

    Returns:
        Whether the run is complete.

    Raises:
        ConfigError: before anything is started.
        CheckpointError: on all ranks, where one of them cannot use the checkpoint.
        TrainingDivergedError: on all ranks at the same step.
        RankLostError: a rank failed, or did not answer for `train.timeout` seconds.
    """
    placement = check(config, launch, fresh=fresh)
    device = choose_device(config.device, launch)
    set_precision(config, device)
    if device.type == "cuda":
        record_flights(config.folder / "flights")
    preemption = Preemption(device)
    with preemption.listening(), _process_group(launch, device):
        if fresh:
            # Not before: another rank may still be looking at what lies there.
            if launch.rank == 0:
                _move_aside(config)
            dist.barrier()
        pipeline = open_pipeline(config.data, config.seed, device)
        try:
            while (run := _train_until_rollback(config, launch, placement, device, pipeline, preemption)) is None:
                gc.collect()  # The networks of before have cycles, and those that are built next need the memory.
            if run.stopped_by and preempted and launch.rank == 0:
                write_text(preempted, f"{run.stopped_by.name}\n")
        finally:
            pipeline.close()
    return run.stopped_by is None


@contextlib.contextmanager
def _process_group(launch: Launch, device: torch.device) -> Iterator[None]:
    start(launch, device)
    try:
        yield
    finally:
        dist.destroy_process_group()


def _train_until_rollback(
    config: RunConfig,
    launch: Launch,
    placement: Placement,
    device: torch.device,
    pipeline: Pipeline,
    preemption: Preemption,
) -> _Run | None:
    """Returns the run, at its end or stopped; None where it has gone back, and is to be built anew as after a kill."""
    run = _Run(config, placement, device, pipeline, preemption)
    try:
        with heartbeat(launch, run.where, warn_after=config.train.timeout / 2):
            run.to_the_end()
            # Here rather than at the very end: wandb, on rank 0 alone, may take longer than the others wait.
            dist.barrier()
    except GoBack:
        return None
    except DataError as error:
        if placement.rank:  # one rank alone meets a broken file; the others only see that it is gone
            print(f"error: rank {placement.rank}: {error}", file=sys.stderr, flush=True)
        raise
    finally:
        run.saver.close()
        if run.tracker:
            run.tracker.close()
    return run


def _move_aside(config: RunConfig) -> None:
    if config.folder.exists():
        aside = config.folder.with_name(f"{config.folder.name}.{datetime.now():%Y%m%d-%H%M%S-%f}")
        config.folder.rename(aside)
        print(f"the earlier run is now in {aside}", file=sys.stderr)


def _say_nothing(_: str) -> None:
    pass


class _Run:
    """One rank's part of a run."""

    def __init__(
        self,
        config: RunConfig,
        placement: Placement,
        device: torch.device,
        pipeline: Pipeline,
        preemption: Preemption,
    ) -> None:
        self.config, self.placement, self.device, self.pipeline = config, placement, device, pipeline
        self._preemption = preemption
        self.stopped_by: signal.Signals | None = None
        """The signal that ends the run before its end."""
        self.steps_per_epoch = pipeline.steps_per_epoch
        self.steps = config.train.epochs * self.steps_per_epoch
        self.cohort = Cohort.on(pipeline, config, placement, device)
        self.meter = Meter(placement, device)
        self.losses = LossWatch(config.health, {})
        self.rollbacks: list[Rollback] = []
        self._told: set[tuple[str, Collapse]] = set()
        self.step = 0
        self.best: Best | None = None
        self.tracker: Tracker | None = None
        self._resume()
        self.saver = Saver(config.folder, self.cohort, self.tracker.say if self.tracker else _say_nothing)
        if self.step < self.steps and self.cohort.averages_gradients:
            share = config.data.global_batch // placement.replicas // config.train.accumulation
            settle(self.cohort, share, Progress(self.step, self.steps_per_epoch, config.train.epochs))
        self.clock = Clock(device)
        self._aside = ""
        self._limited = False
        self._last_line = (time.perf_counter(), self.step)

    def _resume(self) -> None:
        first = self.placement.rank == 0
        found: list[Any] = self._look_around() if first else [None, None, None]
        dist.broadcast_object_list(found, src=0)
        manifest: Manifest | None = found[0]
        self.rollbacks = found[2]
        if manifest is not None:
            checkpoint.load(self.config.folder, manifest, self.cohort)
            self.step, self.best = manifest.step, manifest.best
            self.meter.in_a_row = manifest.in_a_row
            self.losses = LossWatch(self.config.health, manifest.recent)
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

    def _look_around(self) -> list[Any]:
        """The newest checkpoint that counts, what is wrong with newer ones, and the rollbacks."""
        folder = self.config.folder
        rollbacks = rollback.read(folder)
        rollback.supersede(folder, rollbacks)
        manifest, damaged = checkpoint.newest(folder)
        if manifest and manifest.best and manifest.best.step not in checkpoint.steps_on_disk(folder):
            # It had made room for a better one, from which the run has gone back.
            manifest = replace(manifest, best=None)
        return [manifest, damaged, rollbacks]

    def where(self) -> str:
        """Where this rank is."""
        return f"{self._aside} of step {self.step}" if self._aside else f"step {self.step + 1}, {self.clock.last} done"

    def to_the_end(self) -> None:
        """Trains until the last step is done or a signal asks for an earlier end."""
        while self.step < self.steps and not self.stopped_by:
            epoch, done = divmod(self.step, self.steps_per_epoch)
            if epoch and not done and self.cohort.method.held_out(self.config.method):
                self.cohort.method.begin_epoch(survey(self.cohort, self.pipeline))
                self.clock.restart()
            rows = self.placement.rows(self.config.data.global_batch)
            for batch in self.pipeline.train(epoch, done, rows, self.cohort.views):
                self.clock.mark("data")
                progress = Progress(self.step, self.steps_per_epoch, self.config.train.epochs)
                if not rollback.left_out(self.rollbacks, self.step):
                    self._preemption.ask(self.cohort.stop)
                    terms, skipped = train_step(
                        self.cohort, batch.split(self.config.train.accumulation), progress, self.clock
                    )
                    self.meter.add(terms, skipped)
                    if not self._limited:
                        limit_waiting(self.config.train.timeout)
                        self._limited = True
                    if self.step + 1 < self.steps:
                        self.stopped_by = self._preemption.agreed(self.cohort.stop)
                self.step += 1
                if self.tracker:
                    self.tracker.progress(self.step)
                self._report_and_save(batch.ids)
                if self.stopped_by:
                    break
        self.saver.wait()

    def _report_and_save(self, ids: Tensor) -> None:
        """What is due after a step, in the order in which a kill between two of them loses nothing: a checkpoint comes
        after all lines up to its step."""
        config, step = self.config, self.step
        epoch, within = divmod(step, self.steps_per_epoch)
        ends_epoch, ends_run = within == 0, step == self.steps
        save = ends_run or (ends_epoch and epoch % config.checkpoint.every_epochs == 0)
        save |= config.checkpoint.every_steps is not None and step % config.checkpoint.every_steps == 0
        save |= self.stopped_by is not None
        score = ends_run or (ends_epoch and epoch % config.evaluation.every_epochs == 0)

        if not (save or score or ends_epoch or within % config.log.every_steps == 0):
            return
        check_same_rows(self.cohort, ids, step)
        self._write_line()
        if ends_epoch:
            check_same_weights(self.cohort, step)
        if save or score:
            self.cohort.average_buffers()
        # Where a row of skipped updates may end in a rollback, no checkpoint from within pushes out those from before.
        keeps = ends_run or not (config.health.rollback and self.meter.in_a_row)
        if score:
            self._aside = "evaluation"
            top1 = self._evaluate()
            if keeps and (self.best is None or top1 > self.best.top1):
                self.best, save = Best(step, top1), True
        if save and keeps:
            self._aside = "checkpoint"
            standing = Standing(step, self.best, self.meter.in_a_row, self.losses.recent, len(self.rollbacks))
            # A checkpoint after lines that are not on disk would make their loss final.
            hindrance = self.tracker.catch_up() if self.tracker else None
            self.saver.save(standing, config.checkpoint.keep, hindrance)
        if self.stopped_by:
            self._tell_of_the_end(saved=keeps and self.saver.wait())
        self._aside = ""
        self.clock.restart()
        self._last_line = (time.perf_counter(), step)

    def _tell_of_the_end(self, saved: bool) -> None:
        assert self.stopped_by
        seconds = self._preemption.seconds(self.device)
        if self.tracker:
            self.tracker.preempted()
            self.tracker.say(
                f"signal {self.stopped_by.name} at step {self.step}: {'saved' if saved else 'NOT saved'}, ended "
                f"{seconds:.1f} s later; start the same command again to go on"
            )

    def _write_line(self) -> None:
        reading = self.meter.read()
        parts = self.clock.read()
        begin = self._last_line[1]
        seconds, steps = time.perf_counter() - self._last_line[0], self.step - begin
        self._last_line = (time.perf_counter(), self.step)
        names = [name for name, _ in self.config.cohort]
        losses = {"cohort" if k is None else names[k]: values for k, values in reading.losses().items()}
        spikes = self.losses.spikes(losses)
        dead = without_gradient(reading, names)
        if self.tracker:
            means = reading.means
            terms = {f"train/{'cohort' if k is None else names[k]}/{term}": value for (k, term), value in means.items()}
            images_per_second = steps * self.config.data.global_batch / seconds
            left_out = sum(rollback.left_out(self.rollbacks, update) for update in range(begin, self.step))
            self.tracker.write(
                self.step,
                {
                    "epoch": self.step / self.steps_per_epoch,
                    "lr": self.cohort.optimizers()[0].param_groups[0]["lr"],
                    **terms,
                    "train/skipped": reading.skipped,
                    **({"health/left_out": left_out} if left_out else {}),
                    **{f"health/{spike.name}/spikes": spike.count for spike in spikes},
                    **{f"health/{name}/collapsed": CODES[collapse] for name, collapse in dead.items()},
                    "speed/images_per_second": images_per_second,
                    **{f"speed/{part}_ms": 1000 * total / steps for part, total in parts.items()},
                },
            )
            loss = sum(value for (_, term), value in means.items() if term != "grad_norm") / len(self.placement.peers)
            self.tracker.progress(self.step, loss=f"{loss:.3f}", images=f"{images_per_second:.0f}/s")
            if reading.skipped:
                self.tracker.say(
                    f"step {self.step}: {reading.skipped} updates skipped since the last line: non-finite numbers"
                )
        self._tell(dead, ("no gradient",))
        self._answer(reading, spikes, begin)

    def _answer(self, reading: Reading, spikes: Sequence[Spike], begin: int) -> None:
        """To what went wrong in the steps since step `begin`, the last line: says it, goes back or ends the run."""
        config = self.config

        def update(place: int) -> int:
            """The update of the reading's step `place`, which is negative where it is from before the reading."""
            made = [i for i in range(begin, self.step) if not rollback.left_out(self.rollbacks, i)]
            return made[place] if place >= 0 else rollback.before(self.rollbacks, begin, -place)

        found = trouble(config, reading, spikes, update, self.step)
        if found is None:
            return
        if config.health.rollback and len(self.rollbacks) < config.health.max_rollbacks:
            # The update before may be the one that did it: its own loss was taken before it.
            start = min(begin, rollback.before(self.rollbacks, found.first))
            if self.tracker:
                rollback.write(config.folder, [*self.rollbacks, Rollback(start, self.step, found.text)])
                self.tracker.alert(
                    "going back",
                    f"{found.text}. Going back, leaving out steps {start + 1} to {self.step}; rollback "
                    f"{len(self.rollbacks) + 1} of at most health.max_rollbacks = {config.health.max_rollbacks}",
                )
            raise GoBack
        remedies = "a smaller optimizer.lr, train.clip_norm, schedule.warmup_epochs or precision.amp = bf16"
        if config.health.rollback:
            raise TrainingDivergedError(
                f"{found.text}. The run has gone back {len(self.rollbacks)} times; the limit is health.max_rollbacks = "
                f"{config.health.max_rollbacks}. Try {remedies}"
            )
        if found.ends_run:
            raise TrainingDivergedError(f"{found.text}. The last checkpoint is from before; try {remedies}")
        if self.tracker:
            self.tracker.alert("loss spike", f"{found.text}. Should it stay: try {remedies}, or health.rollback = true")

    def _tell(self, found: dict[str, Collapse], looked_for: Sequence[Collapse]) -> None:
        """Says which peers have collapsed, each once until it has recovered."""
        for name, collapse in found.items():
            if (name, collapse) not in self._told and self.tracker:
                self.tracker.alert(
                    f"{name} collapsed", f"step {self.step}: {name} has collapsed, {collapse}: {EXPLAINED[collapse]}"
                )
        self._told = {told for told in self._told if told[1] not in looked_for} | set(found.items())

    def _evaluate(self) -> float:
        """Scores the cohort, and its averages where there are some. Returns the mean top-1 of the peers."""
        values = evaluate_cohort(self.cohort, self.pipeline)
        found = collapsed(values, [name for name, _ in self.config.trained])
        if self.tracker:
            health = {f"health/{name}/collapsed": CODES[collapse] for name, collapse in found.items()}
            self.tracker.write(self.step, {"epoch": self.step / self.steps_per_epoch, **values, **health})
            shown = ", ".join(
                f"{key.split('/')[1]} {value:.2f}"
                for key, value in values.items()
                if key.endswith("/top1") and key[:3] == "val"
            )
            self.tracker.say(f"epoch {self.step // self.steps_per_epoch}: top-1 % {shown}")
        self._tell(found, ("all images alike", "another's twin"))
        peers = [values[f"val/{name}/top1"] for name, _ in self.config.trained]
        return sum(peers) / len(peers)

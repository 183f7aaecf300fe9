"""The loop: steps, lines of metrics, evaluations and checkpoints, from wherever the run stands to its end."""

from __future__ import annotations

import contextlib
import gc
import math
import signal
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor

from data_pipelines import Batch, DataError, Pipeline
from engine.cohort.cohort import open_cohort
from engine.cohort.compiling import compiled_so_far
from engine.cohort.optim import rate_of
from engine.cohort.precision import set_precision
from engine.config import RunConfig
from engine.files import write_json, write_text
from engine.preflight import check_run
from engine.ranks.collectives import Launch, choose_device, limit_waiting, process_group, record_flights
from engine.ranks.gathering import StoppedEarly
from engine.ranks.heartbeat import Whereabouts, heartbeat
from engine.ranks.place import Place
from engine.ranks.placement import Placement
from engine.reporting.lines import Stretch, report_end, report_scores, report_training
from engine.reporting.opening import summary
from engine.reporting.predictions import write_tables
from engine.reporting.tracking import Tracker, follow, last_evaluation
from engine.safety import going_on, loading, rollback, saving
from engine.safety.answers import Told, answer, answer_scores, tell_collapses
from engine.safety.checkpoint import Best, Standing
from engine.safety.damage import tell_damage
from engine.safety.going_on import Standpoint
from engine.safety.health import LINES_SHOW, SCORES_SHOW, collapsed, examine
from engine.safety.preemption import Preemption
from engine.safety.rollback import GoBack
from engine.safety.saving import NotSavedError, Saver
from engine.safety.spikes import LossWatch
from engine.start import Claim, claim, open_together
from engine.training.batching import settle_batching
from engine.training.consistency import check_same_rows, check_same_weights
from engine.training.due import Due, due
from engine.training.evaluation import evaluate_cohort, survey
from engine.training.graphs import Graphed
from engine.training.meter import Meter
from engine.training.remarks import remarks, twins
from engine.training.sharing import share_decoding
from engine.training.step import settle, train_step, update_peers
from engine.training.timing import Clock
from losses import Progress

ALL = 2**62
"""Checkpoints kept where none is to be removed."""


def train(
    config: RunConfig,
    launch: Launch,
    *,
    fresh: bool = False,
    preempted: Path | None = None,
    before: Sequence[int] = (),
    ends_process: bool = False,
) -> bool:
    """Trains the cohort to its last step, going on from the newest whole checkpoint if there is one.

    SIGUSR1, SIGTERM, SIGHUP or SIGINT to any rank ends all of them early, with a checkpoint of the step they are at.

    Args:
        fresh: start over; a folder of an earlier run is moved aside.
        preempted: where the name of the signal is written if one ended the run early.
        before, ends_process: see `Preemption.listening`.

    Returns:
        Whether the run is complete.

    Raises:
        ConfigError: before anything is started.
        CheckpointError: on all ranks, where one of them cannot use the checkpoint.
        TrainingDivergedError: on all ranks at the same step.
        NotSavedError: on all ranks, at the very end.
        RankLostError: a rank failed, or did not answer for `train.timeout` seconds.
        TimeoutError: a rank has never come.
    """
    placement = check_run(config, launch, fresh=fresh)
    device = choose_device(config.device, launch)
    set_precision(config, device)
    if device.type == "cuda":
        record_flights(config.folder / "flights")
    preemption, where = Preemption(device), Whereabouts()
    with preemption.listening(before=before, ends_process=ends_process):
        try:
            with (
                process_group(launch, device, preemption.asked) as word,
                heartbeat(launch, word, where, config.train.timeout),
                claim(config, launch, fresh=fresh, asked=preemption.asked) as held,
                contextlib.closing(open_together(config, device)) as pipeline,
            ):
                share_decoding(config, placement, pipeline)
                if launch.rank == 0 and pipeline.remarks:
                    print(*pipeline.remarks, sep="\n", file=sys.stderr)
                part = config, where, placement, device, pipeline, preemption, held
                while (run := _train_until_rollback(*part)) is None:
                    gc.collect()  # The networks of before have cycles, and those that are built next need the memory.
            stopped_by, saved, step = run.stopped_by, run.saved, run.step
        except StoppedEarly as stopped:
            if launch.rank == 0:
                print(f"{config.title}: {stopped}; start the same command again to go on", file=sys.stderr, flush=True)
            stopped_by, saved, step = stopped.signal, True, 0
        if saved and stopped_by and preempted and launch.rank == 0:
            write_text(preempted, f"{stopped_by.name}\n")
    if not saved:
        raise NotSavedError(
            f"{config.folder}: step {step}, the last, could not be saved; what was trained since the checkpoint "
            "before is lost: see to the disk and start the same command again"
        )
    return stopped_by is None


def _train_until_rollback(
    config: RunConfig,
    where: Whereabouts,
    placement: Placement,
    device: torch.device,
    pipeline: Pipeline,
    preemption: Preemption,
    held: Claim,
) -> _Run | None:
    """Returns the run, at its end or stopped; None where it has gone back, and is to be built anew as after a kill."""
    where.limited = False
    run = _Run(config, where, placement, device, pipeline, preemption, held)
    where.ask = run.where
    try:
        with where.guard():
            try:
                run.to_the_end()
            except GoBack:
                where.ask = where.starting
                return None
            # Here rather than at the very end: wandb, on rank 0 alone, may take longer than the others wait.
            dist.barrier()
    except DataError as error:
        if placement.rank:  # one rank alone meets a broken file; the others only see that it is gone
            print(f"error: rank {placement.rank}: {error}", file=sys.stderr, flush=True)
        raise
    finally:
        run.saver.close()
        run.cohort.close()
        if run.tracker:
            run.tracker.close()
    return run


def _say_nothing(_: str) -> None:
    pass


def _kept(config: RunConfig, now: Due) -> int:
    """Newest checkpoints. What breaks the weights shows at the update after, when they may be saved: one from before is
    there until the end."""
    return max(config.checkpoint.keep, 1 if now.ends_run else 2)


class _Run:
    """One rank's part of a run."""

    def __init__(
        self,
        config: RunConfig,
        where: Whereabouts,
        placement: Placement,
        device: torch.device,
        pipeline: Pipeline,
        preemption: Preemption,
        held: Claim,
    ) -> None:
        self._where, self._held = where, held
        self.config, self.placement, self.device, self.pipeline = config, placement, device, pipeline
        self._preemption = preemption
        self.stopped_by: signal.Signals | None = None
        """The signal that ends the run before its end."""
        self.saved = True
        """Whether nothing of what was trained is lost at the end."""
        found = going_on.find(config, pipeline, placement.rank)
        self.steps_per_epoch = pipeline.steps_per_epoch
        self.steps = config.train.steps(self.steps_per_epoch)
        self.cohort = open_cohort(pipeline, config, placement, device, initial=found.manifest is None)
        self.meter = Meter(placement, device)
        self.losses = LossWatch(config.health, {})
        self.rollbacks = found.rollbacks
        self.step = 0
        self.best: Best | None = None
        self.tracker: Tracker | None = None
        self._resume(found)
        self._alert = self.tracker.alert if self.tracker else None
        self._told: Told = frozenset()
        self._spiking, self._begin = False, self.step
        self.saver = Saver(config.folder, self.cohort, self._say, held.check, held.mark)
        self._scored = last_evaluation(config.folder)
        if self.step < self.steps:
            settle_batching(self.cohort, self._progress, config.folder, self._say, going_on=self.step > 0)
            settle(self.cohort, self._progress, self._say)
        self._updater = Graphed(self._say) if config.precision.graphs == "on" else update_peers
        self.clock = Clock(device)
        self._aside = ""
        self._stop = torch.zeros(1, device=device)
        """The number of a signal that this rank got, 0 without."""
        self._last_line = (time.perf_counter(), self.step)

    def _resume(self, found: Standpoint) -> None:
        manifest = found.manifest
        if manifest is not None:
            loading.load(self.config.folder, manifest, self.cohort)
            self.step, self.best = manifest.step, manifest.best
            self.meter.in_a_row = manifest.in_a_row
            self.losses = LossWatch(self.config.health, manifest.recent)
        elif self.cohort.meeting is not None:
            self.cohort.meeting.start_over()
        if self.placement.rank == 0:
            self.tracker = follow(self.config, self.placement, self.step, self.steps, found.said, self._held.check)
            self.tracker.say("\n".join(summary(self.config, self.placement, self.pipeline, self.device, self.steps)))
            write_json(self.config.folder / "classes.json", self.pipeline.class_names)
        self._say = self.cohort.compiler.say = self.tracker.say if self.tracker else _say_nothing
        if not self.step:
            for note in (*remarks(self.config, self.steps_per_epoch, self.pipeline.train_size), *twins(self.cohort)):
                self._say(f"note: {note}")

    def where(self) -> Place:
        """Where this rank is."""
        if self._aside:
            return Place(self.step, math.inf, f"{self._aside} of step {self.step}")
        done = f"{self.clock.last} done" if self.clock.parts else "waiting for data"
        return Place(self.step + 1, self.clock.parts, f"step {self.step + 1}, {done}")

    @property
    def _progress(self) -> Progress:
        return Progress(self.step, self.steps_per_epoch, self.config.train.epochs_of(self.steps_per_epoch))

    def to_the_end(self) -> None:
        """Trains until the last step is done or a signal asks for an earlier end."""
        while self.step < self.steps and not self.stopped_by:
            epoch, done = divmod(self.step, self.steps_per_epoch)
            if epoch and not done and survey(self.cohort, self.pipeline):
                self.clock.restart()
            data, parts = self.config.data, self.config.train.accumulation
            rows = self.placement.rows(data.global_batch, parts, data.tuple_size)
            for batch in self.pipeline.train(epoch, done, rows, self.cohort.views):
                self.clock.mark("data")
                if not rollback.left_out(self.rollbacks, self.step):
                    self._update(batch)
                self.step += 1
                self.clock.next_step()
                if self.tracker:
                    self.tracker.progress(self.step)
                now = due(self.config, self.step, self.steps_per_epoch, stopping=self.stopped_by is not None)
                if now.line:
                    self._look_up(now, batch.ids)
                if self.stopped_by or self.step == self.steps:
                    break
        self.saver.wait()
        self._held.check()

    def _update(self, batch: Batch) -> None:
        self._preemption.ask(self._stop)
        parts = batch.split([len(share.rows) for share in self.cohort.shares])
        outcome = train_step(self.cohort, parts, self._progress, self.clock, self._stop, self._updater)
        self.meter.add(outcome)
        if not self._where.limited:
            limit_waiting(self.config.train.timeout)
            self._where.limited = True
            if (compiled := compiled_so_far()) is not None:
                self._say(str(compiled))
        if self.step + 1 < self.steps:
            self.stopped_by = self._preemption.agreed(outcome.stop)

    def _look_up(self, now: Due, ids: Tensor) -> None:
        """What is due after a step, in the order in which a kill between two of them loses nothing: a checkpoint comes
        after all lines up to its step."""
        self._held.check()
        check_same_rows(self.cohort, ids, self.step)
        self._line()
        if now.ends_epoch or now.ends_run:
            check_same_weights(self.cohort, self.step)
        if now.save or now.score:
            self.cohort.average_buffers()
        # Nothing from within a row of skipped or spiking updates pushes out what was before it, and it is saved only at
        # an end, where it may not end in a rollback.
        calm = not (self.meter.in_a_row or self._spiking)
        keeps = calm or now.ends_run or (self.stopped_by is not None and not self.config.health.rollback)
        save = now.save
        if now.score:
            self._aside = "evaluation"
            top1 = self._score()
            if keeps and (self.best is None or top1 > self.best.top1):
                self.best, save = Best(self.step, top1), True
        if now.ends_epoch or now.score or self.stopped_by:
            tell_damage(self.pipeline, self.placement, self.config.folder, self._say)
        if save and keeps:
            self._aside = "checkpoint"
            here = self.step, self.best, self.meter.in_a_row, self.losses.recent
            standing = Standing(*here, len(self.rollbacks), self.steps_per_epoch, self.pipeline.contents)
            keep = _kept(self.config, now) if calm else ALL
            self._save(standing, keep, last=now.ends_run or self.stopped_by is not None)
        if self.stopped_by:
            seconds = self._preemption.seconds(self.device)
            if self.tracker:
                report_end(self.tracker, self.step, self.stopped_by, keeps and self.saved, seconds)
        self._aside = ""
        self.clock.restart()
        self._last_line = (time.perf_counter(), self.step)

    def _save(self, standing: Standing, keep: int, *, last: bool) -> None:
        """Has a checkpoint written; the last one is waited for, and tried again."""
        for pause in (0.0, *saving.AGAIN):
            time.sleep(pause)
            # A checkpoint after lines that are not on disk would make their loss final.
            hindrance = self.tracker.catch_up() if self.tracker else None
            self.saver.save(standing, keep, hindrance, last=last)
            if not last:
                return
            written = [self.saver.wait()]
            dist.broadcast_object_list(written, src=0)
            self.saved = written[0]
            if self.saved:
                return
            self._held.check()

    def _line(self) -> None:
        """Reads the meter, for a line of metrics and for the answer to what went wrong since the line before."""
        reading, parts = self.meter.read(), self.clock.read()
        (since, begin), self._last_line = self._last_line, (time.perf_counter(), self.step)
        signs = examine(reading, self.losses, [name for name, _ in self.config.cohort])
        if self.tracker:
            stretch = Stretch(
                begin=begin,
                end=self.step,
                epoch=self.step / self.steps_per_epoch,
                seconds=self._last_line[0] - since,
                parts=parts,
                left_out=sum(rollback.left_out(self.rollbacks, update) for update in range(begin, self.step)),
                lr=rate_of(self.cohort.optimizers()[0]),
            )
            report_training(self.tracker, self.config, stretch, reading, signs)
        self._told = tell_collapses(signs.dead, LINES_SHOW, self._told, self.step, self._alert)
        self._spiking, self._begin = bool(signs.spikes), begin
        answer(self.config, self.rollbacks, reading, signs.spikes, begin, self.step, self._alert)

    def _score(self) -> float:
        """Scores the cohort, and its averages where there are some. Returns the mean top-1 of the peers."""
        names = self.config.learners
        scores, kept = evaluate_cohort(self.cohort, self.pipeline)
        found = collapsed(scores, self._scored, names)
        self._scored = scores
        if self.tracker:
            write_tables(self.config, kept, self.pipeline, self.tracker.say)
            report_scores(self.tracker, self.step, self.step / self.steps_per_epoch, scores, found)
        self._told = tell_collapses(found, SCORES_SHOW, self._told, self.step, self._alert)
        answer_scores(self.config, self.rollbacks, scores, self._begin, self.step, self.meter.in_a_row, self._alert)
        return sum(scores[f"val/{name}/top1"] for name in names) / len(names)

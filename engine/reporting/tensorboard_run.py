"""TensorBoard, aside of training: the scalars of each line of metrics, in event files in the run's folder."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from engine.config import RunConfig
from engine.config.loading import dump
from engine.reporting.sink import Sink

PATIENCE = 10.0
"""Seconds that a run waits at its end for what is still to be written, at most."""


class TensorBoardRun(Sink):
    """The event files of a run, one for each start. What it is told goes there in order, by a thread.

    Args:
        config: of the run, whose `log.tensorboard` is true.
        step: where this start goes on. TensorBoard then hides what an earlier start has written of later steps.
        say: told once why there will be no more. From the thread, too.
    """

    def __init__(self, config: RunConfig, step: int, say: Callable[[str], None]) -> None:
        super().__init__("tensorboard", config.folder, say)
        self._config, self._step = config, step
        self._folder = config.folder / "tensorboard"
        self._writer: Any = None
        self._do(self._start)

    def write(self, line: dict[str, Any]) -> None:
        """A line of metrics; what is null there, as it was not finite, leaves a gap."""
        self._do(lambda: self._add(line))

    def finish(self) -> None:
        """Ends the file of this start."""
        self._do(lambda: self._writer.close())
        if not self._aside.wait(PATIENCE):
            self._leave(f"has not been written within {PATIENCE:g} s; going on without it, {self._instead}")
        self._aside.end()

    def _start(self) -> None:
        from torch.utils import tensorboard  # takes seconds, and is an extra

        # What an event file has of a step that is done again would be drawn twice.
        begin = self._step + 1 if self._step else None
        self._writer = tensorboard.SummaryWriter(str(self._folder), purge_step=begin)
        self._writer.add_text("config", "\n".join(f"    {line}" for line in dump(self._config).splitlines()), 0)

    def _add(self, line: dict[str, Any]) -> None:
        for key, value in line.items():
            if key != "step" and isinstance(value, int | float):
                self._writer.add_scalar(key, value, line["step"])
        self._writer.flush()

"""wandb, aside of training: whatever it does, and however long it takes, a step waits for none of it."""

from __future__ import annotations

import contextlib
import os
import signal
import uuid
from collections.abc import Callable
from pathlib import Path
from typing import Any

import yaml

from engine.config import RunConfig
from engine.config.loading import dump
from engine.files import read_text, write_text
from engine.reporting.sink import Sink

GRACE = 5.0
"""Seconds that a run which a signal ends leaves wandb to finish, at most."""


class WandbRun(Sink):
    """A run of wandb, under an id that survives restarts. What it is told goes there in order, by a thread.

    Args:
        config: of the run, whose `log.wandb` is not disabled.
        say: told once why there will be no more rows, and once that rows wait. From the thread, too.
    """

    def __init__(self, config: RunConfig, say: Callable[[str], None]) -> None:
        super().__init__("wandb", config.folder, say)
        self._config = config
        self._run: Any = None
        self._late = False
        super()._do(self._start)

    def write(self, line: dict[str, Any]) -> None:
        """A row of its history; `line` holds its step."""
        self._do(lambda: self._run.log(line))

    def alert(self, title: str, text: str) -> None:
        """Has wandb tell a person."""
        self._do(lambda: self._run.alert(title=title, text=text))

    def mark_preempting(self) -> None:
        """Says that the run will go on later."""
        self._do(lambda: self._run.mark_preempting())

    def finish(self, exit_code: int, *, soon: bool) -> None:
        """Ends it: waits until wandb has taken all rows, `log.wandb_timeout` seconds at most, or a few if it has to be
        `soon`."""
        limit = min(GRACE, self._config.log.wandb_timeout) if soon else self._config.log.wandb_timeout
        self._aside.do(lambda: self._end(exit_code))
        if not self._aside.wait(limit):
            self._leave(
                f"has not finished within {limit:g} s; {self._instead}; `wandb sync` sends what it has in "
                f"{self._config.folder / 'wandb'}"
            )
            # Or its own hook would wait for it at the end of this process, without a limit.
            _kill_its_process()
            self._aside.wait(GRACE)
        self._aside.end()

    def _do(self, action: Callable[[], object]) -> None:
        if self._gone:
            return
        # Its start has that limit of its own.
        limit = self._config.log.wandb_timeout * (1 if self._run is not None else 2)
        if self._aside.busy > limit and not self._late:
            self._late = True
            self._say(f"wandb: has not answered for {limit:g} s; its rows wait, training goes on")
        super()._do(action)

    def _start(self) -> None:
        config, id_file = self._config, self._config.folder / "wandb_id"
        if not id_file.exists():
            write_text(id_file, uuid.uuid4().hex[:12])
        import wandb

        self._run = wandb.init(
            project=config.log.wandb_project,
            name=config.title,
            id=read_text(id_file).strip(),
            dir=str(config.folder),
            mode=config.log.wandb,
            resume="allow",
            config=yaml.safe_load(dump(config)),
            # It would pass on what is printed as well, from the thread that prints it, and so hold that up.
            settings=wandb.Settings(init_timeout=config.log.wandb_timeout, silent=True, console="off"),
        )
        # The step is a value of ours, so that lines that a restarted run repeats fall on the same place.
        self._run.define_metric("step")
        self._run.define_metric("*", step_metric="step")

    def _end(self, exit_code: int) -> None:
        if self._run is not None:
            self._attempt(lambda: self._run.finish(exit_code=exit_code))
        with contextlib.suppress(Exception):  # as in Sink; there is nothing left to go on without
            import wandb

            wandb.teardown(exit_code)


def _kill_its_process() -> None:
    for children in Path("/proc/self/task").glob("*/children"):
        with contextlib.suppress(OSError):
            for child in children.read_text().split():
                if Path(f"/proc/{child}/comm").read_text().strip() == "wandb-core":
                    os.kill(int(child), signal.SIGKILL)

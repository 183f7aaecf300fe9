"""Following a run: `metrics.jsonl` first, then wandb and TensorBoard, then a progress bar. Only rank 0 has one."""

from __future__ import annotations

import contextlib
import json
import math
import os
import platform
import subprocess
import sys
import threading
from collections.abc import Callable, Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

from engine.config import RunConfig
from engine.config.identity import changes
from engine.config.loading import dump_anywhere
from engine.files import opener, read_bytes, read_text, write_json, write_text
from engine.ranks.placement import Placement
from engine.ranks.planning.choosing import automatic
from engine.reporting.aside import Aside
from engine.reporting.bar import Bar, clock
from engine.reporting.console import Stderr
from engine.reporting.tensorboard_run import TensorBoardRun
from engine.reporting.wandb_run import WandbRun

_PACKAGES = ("torch", "torchvision", "timm", "numpy", "wandb", "nvidia-dali-cuda120", "nvidia-dali-cuda130", "pydantic")


def read_metrics(run: Path) -> list[dict[str, Any]]:
    """The lines of a run's `metrics.jsonl`, but for one that was cut short by a kill or is no line of ours."""
    return [line for _, line in _lines(run / "metrics.jsonl") if line is not None]


def _lines(path: Path) -> list[tuple[bytes, dict[str, Any] | None]]:
    """The lines of a file as they stand there, and what they say; None for what is no line of ours."""
    try:
        content = read_bytes(path)
    except FileNotFoundError:
        return []
    return [(text, _parsed(text)) for text in content.split(b"\n") if text]


def _parsed(text: bytes) -> dict[str, Any] | None:
    try:
        line = json.loads(text)
    except (ValueError, RecursionError):
        return None
    return line if isinstance(line, dict) and type(line.get("step")) is int else None


def last_evaluation(run: Path) -> dict[str, Any] | None:
    """The last line of a run's metrics that holds an evaluation; NaN for what was not finite."""
    scored = [line for line in read_metrics(run) if "val/disagreement" in line]
    return {key: math.nan if x is None else x for key, x in scored[-1].items()} if scored else None


def follow(
    config: RunConfig,
    placement: Placement,
    step: int,
    steps: int,
    said: Sequence[str],
    check: Callable[[], None] = lambda: None,
) -> Tracker:
    """Begins to follow a run on rank 0, wherever it stands, and says so.

    Args:
        step: where it goes on, of `steps`.
        said: what a person should be told first, such as which checkpoints are not used.
        check: raises an OSError where the run's folder belongs to another run by now.
    """
    changed = changes(config) if step else []
    before = [start["ranks"] for start in read_starts(config.folder / "starts.json")[-1:] if step]
    record_start(config, placement.world)
    tracker = Tracker(config, step, steps, check)
    for message in said:
        tracker.say(message)
    tracker.say(f"{config.title}: {config.method.name}, {placement}; {config.folder}")
    found = automatic(config, placement.world) if config.placement.kind == "auto" else None
    if found is not None:
        tracker.say(f"placement.kind = auto: {found[1]}")
    if before and before[0] != placement.world:
        tracker.say(f"{before[0]} ranks at the start before, {placement.world} now: peers live as {placement}")
    if step:
        state = "complete" if step >= steps else "going on"
        tracker.say(f"{state} at step {step} of {steps}, from its checkpoint")
    if changed:
        tracker.say(f"other than at the start before: {', '.join(changed)}")
    return tracker


def record_start(config: RunConfig, world: int) -> None:
    """Keeps the resolved config, and for each start the command, the git revision, the machine and the versions."""
    config.folder.mkdir(parents=True, exist_ok=True)
    write_text(config.folder / "config.yaml", dump_anywhere(config))
    path = config.folder / "starts.json"
    start = {
        "command": sys.argv,
        "ranks": world,
        "git": _git("rev-parse", "HEAD"),
        "git_changes": _git("status", "--porcelain", "--untracked-files=no"),
        "python": platform.python_version(),
        "platform": platform.platform(),
        "versions": {name: version for name in _PACKAGES if (version := _version(name))},
    }
    write_json(path, [*read_starts(path), start])


def read_starts(path: Path) -> list[Any]:
    """What `record_start` has kept in a file; one that is damaged is moved aside."""
    try:
        starts = json.loads(read_text(path))
    except FileNotFoundError:
        return []
    except (ValueError, RecursionError):
        path.replace(path.with_name("starts.json.damaged"))
        return []
    return starts if isinstance(starts, list) else [starts]


def _git(*arguments: str) -> str | None:
    where = Path(__file__).parent
    try:
        done = subprocess.run(["git", *arguments], cwd=where, capture_output=True, text=True, timeout=10, check=True)
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip()


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


class MetricsFile:
    """The file of metrics. A thread writes what it is given: at once, unless the disk is slow, or full."""

    def __init__(self, path: Path, step: int, check: Callable[[], None], say: Callable[[str], None]) -> None:
        self._path, self._check, self._say = path, check, say
        self._size = len(_cut_after(path, step))
        self._unwritten, self._refusal, self._lock = "", "", threading.Lock()
        self._aside = Aside("metrics", 1)

    def add(self, line: str) -> None:
        """Has a line written, and waits for nothing."""
        with self._lock:
            self._unwritten += line
        self._aside.do(self._write)  # or one that has not begun will write this line too

    def catch_up(self) -> str | None:
        """Waits until all lines are on disk. Returns: None, or which file does not take them, and why; they wait on."""
        self._aside.do(self._write)
        self._aside.wait()
        return self._refusal or None

    def close(self) -> None:
        """Waits likewise, for the last time."""
        if refusal := self.catch_up():
            self._say(f"{refusal}; the last lines of metrics are lost")
        self._aside.end()

    def _write(self) -> None:
        text, waiting = self._unwritten, bool(self._refusal)
        self._refusal = ""
        if not text:
            return
        try:
            with open(self._path, "a", encoding="utf-8", opener=opener) as file:
                # After opening: a successor puts another file in the place of this one.
                self._check()
                file.write(text)
                file.flush()
                os.fsync(file.fileno())
        except OSError as error:
            with contextlib.suppress(OSError), open(self._path, "r+b", opener=opener) as file:
                file.truncate(self._size)  # A full disk takes a part of a line.
            self._refusal = f"{self._path}: {error.strerror or error}"
            if not waiting:
                self._say(f"{self._refusal}; the lines of metrics wait in memory, training goes on")
            return
        self._size += len(text)
        with self._lock:
            self._unwritten = self._unwritten[len(text) :]


class Tracker:
    """Writes what a run measures. A step is written once: what a killed run wrote after its checkpoint goes aside.

    Nothing of it holds training up: lines are written, wandb and TensorBoard are told and texts are printed by threads.
    """

    def __init__(self, config: RunConfig, step: int, steps: int, check: Callable[[], None] = lambda: None) -> None:
        self._file = MetricsFile(config.folder / "metrics.jsonl", step, check, self.say)
        self._exit_code = 0
        self._stderr = Stderr()
        self._epochs = None if config.train.max_steps else config.train.epochs
        self._shown = dict[str, str]()
        self._bar = Bar(config.title, step, steps, self._stderr, shown=config.log.progress)
        self._steps = steps
        self._wandb = WandbRun(config, self.say) if config.log.wandb != "disabled" else None
        self._tensorboard = TensorBoardRun(config, step, self.say) if config.log.tensorboard else None

    def write(self, step: int, values: dict[str, Any]) -> None:
        """Keeps one line of metrics. Numbers that are not finite become null."""
        line = {"step": step} | {
            key: None if isinstance(value, float) and not math.isfinite(value) else value
            for key, value in values.items()
        }
        self._file.add(json.dumps(line) + "\n")
        if self._wandb:
            self._wandb.write(line)
        if self._tensorboard:
            self._tensorboard.write(line)

    def catch_up(self) -> str | None:
        """As `MetricsFile.catch_up`."""
        return self._file.catch_up()

    def progress(self, step: int, **shown: str) -> None:
        """Moves the bar; what a line of metrics has shown stays there until the next, beside the epoch where the run
        is as long as so many of them."""
        self._shown |= shown
        epochs = self._epochs
        beside = {"epoch": f"{min(epochs, 1 + step * epochs // max(self._steps, 1))}/{epochs}"} if epochs else {}
        words = ", ".join(f"{key}={value}" for key, value in {**beside, **self._shown}.items())
        self._bar.at(step, words, news=bool(shown))

    @property
    def left(self) -> str:
        """How long the run will take from here, as far as that is known."""
        seconds = self._bar.left
        return f"; {clock(seconds)} left" if seconds else ""

    def say(self, text: str) -> None:
        """Prints a line without breaking the bar."""
        self._bar.say(text)

    def alert(self, title: str, text: str) -> None:
        """Prints a line about something that a person should look at, and has wandb tell of it."""
        self.say(text)
        if self._wandb:
            self._wandb.alert(title, text)

    def preempted(self) -> None:
        """Tells wandb that the run will go on later."""
        self._exit_code = 1  # wandb takes a run that ends with 0 for a finished one, preempted or not.
        if self._wandb:
            self._wandb.mark_preempting()

    def close(self) -> None:
        """Ends the bar, the file and the wandb run."""
        self._bar.close()
        self._file.close()
        if self._wandb:
            self._wandb.finish(self._exit_code, soon=bool(self._exit_code))
        if self._tensorboard:
            self._tensorboard.finish()
        self._stderr.close()


def _cut_after(path: Path, step: int) -> str:
    """Takes lines of later steps, and what is no line, out of a file of metrics. They are kept beside it.

    Returns:
        What stays.
    """
    kept, cut = [], []
    for text, line in _lines(path):
        if line is not None and line["step"] <= step:
            kept.append(json.dumps(line))
        else:
            cut.append(text + b"\n")
    if cut:
        with open(path.with_name("metrics.cut.jsonl"), "ab", opener=opener) as aside:
            aside.write(b"".join(cut))
    text_kept = "".join(line + "\n" for line in kept)
    write_text(path, text_kept)
    return text_kept

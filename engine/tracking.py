"""Following a run: `metrics.jsonl` first, then wandb, then a progress bar. Only rank 0 has one of these."""

from __future__ import annotations

import json
import math
import os
import platform
import subprocess
import sys
import uuid
from importlib import metadata
from pathlib import Path
from typing import Any

import yaml
from tqdm import tqdm

from engine.config import RunConfig
from engine.config_file import dump
from engine.files import write_json, write_text

_PACKAGES = ("torch", "torchvision", "timm", "numpy", "wandb", "nvidia-dali-cuda120", "nvidia-dali-cuda130", "pydantic")


def read_metrics(run: Path) -> list[dict[str, Any]]:
    """The lines of a run's `metrics.jsonl`; a last line that was cut short by a kill is left out."""
    path = run / "metrics.jsonl"
    if not path.exists():
        return []
    lines = []
    for line in path.read_text(encoding="utf-8").splitlines():
        try:
            lines.append(json.loads(line))
        except json.JSONDecodeError:
            break
    return lines


def record_start(config: RunConfig, world: int) -> None:
    """Keeps the resolved config, and for each start the command, the git revision, the machine and the versions."""
    config.folder.mkdir(parents=True, exist_ok=True)
    write_text(config.folder / "config.yaml", dump(config))
    path = config.folder / "starts.json"
    starts = json.loads(path.read_text(encoding="utf-8")) if path.exists() else []
    starts.append(
        {
            "command": sys.argv,
            "ranks": world,
            "git": _git("rev-parse", "HEAD"),
            "git_changes": _git("status", "--porcelain", "--untracked-files=no"),
            "python": platform.python_version(),
            "platform": platform.platform(),
            "versions": {name: version for name in _PACKAGES if (version := _version(name))},
        }
    )
    write_json(path, starts)


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


class Tracker:
    """Writes what a run measures. A step is written once: what a killed run wrote after its checkpoint is cut off."""

    def __init__(self, config: RunConfig, step: int, steps: int) -> None:
        self._path = config.folder / "metrics.jsonl"
        kept = [line for line in read_metrics(config.folder) if line["step"] <= step]
        write_text(self._path, "".join(json.dumps(line) + "\n" for line in kept))
        self._file = self._path.open("a", encoding="utf-8")
        self._wandb = _start_wandb(config, step)
        self._bar = tqdm(
            total=steps,
            initial=step,
            desc=config.title,
            unit="step",
            disable=not config.log.progress,
            dynamic_ncols=True,
            # A log file is read later: a line now and then is enough there.
            mininterval=0.2 if sys.stderr.isatty() else 10.0,
        )

    def write(self, step: int, values: dict[str, Any]) -> None:
        """Keeps one line of metrics, on disk before this returns. Numbers that are not finite become null."""
        line = {"step": step} | {
            key: None if isinstance(value, float) and not math.isfinite(value) else value
            for key, value in values.items()
        }
        self._file.write(json.dumps(line) + "\n")
        self._file.flush()
        os.fsync(self._file.fileno())
        if self._wandb is not None:
            try:
                self._wandb.log(line | {"step": step})
            except Exception as error:  # wandb is a sink: whatever it raises, training goes on.
                self.say(f"wandb: {error}; going on without it, metrics are in {self._path}")
                self._wandb = None

    def progress(self, step: int, **shown: str) -> None:
        """Moves the bar."""
        self._bar.set_postfix(shown, refresh=False)
        self._bar.update(step - self._bar.n)

    def say(self, text: str) -> None:
        """Prints a line without breaking the bar."""
        self._bar.write(text, file=sys.stderr)

    def close(self) -> None:
        """Ends the bar, the file and the wandb run."""
        self._bar.close()
        self._file.close()
        if self._wandb is not None:
            try:
                self._wandb.finish()
            except Exception as error:  # as above
                self.say(f"wandb: {error}")


def _start_wandb(config: RunConfig, step: int) -> Any:
    if config.log.wandb == "disabled":
        return None
    id_file = config.folder / "wandb_id"
    if not id_file.exists():
        write_text(id_file, uuid.uuid4().hex[:12])
    try:
        import wandb

        run = wandb.init(
            project=config.log.wandb_project,
            name=config.title,
            id=id_file.read_text(encoding="utf-8").strip(),
            dir=str(config.folder),
            mode=config.log.wandb,
            resume="allow",
            config=yaml.safe_load(dump(config)),
            settings=wandb.Settings(init_timeout=config.log.wandb_timeout, silent=True),
        )
        # The step is a value of ours, so that lines that a restarted run repeats fall on the same place.
        run.define_metric("step")
        run.define_metric("*", step_metric="step")
        return run
    except Exception as error:  # as in Tracker.write
        print(f"wandb: {error}; going on without it, metrics are in {config.folder / 'metrics.jsonl'}", file=sys.stderr)
        return None

"""`launch/bench start`: how long one waits for a command that has just been typed, against importing torch alone."""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

from launch.bench.turns import quartiles

_ROOT = Path(__file__).parents[2]
_CONFIG = "configs/fashion_mnist/quickstart_dml.yaml"
_TORCH = "import torch"
_FIRST_STEP = "step 1 of 1,"


def starting(rounds: int, threads: int) -> None:
    """Times `--help`, `--check` of the quickstart and its way to the line of the first step, each as often as said and
    once before, in turn. Each is a process of its own with so many threads."""
    times: dict[str, list[float]] = {name: [] for name in ("--help", "--check", "the first step", _TORCH)}
    with tempfile.TemporaryDirectory(prefix="cohort-start-") as made:
        for done in range(rounds + 1):
            run = ("launch/train.py", _CONFIG, f"dir={made}/{done}")
            one_step = ("train.epochs=null", "train.max_steps=1")
            words: dict[str, tuple[Sequence[str], str | None]] = {
                "--help": (("launch/train.py", "--help"), None),
                "--check": ((*run, "--check"), None),
                "the first step": ((*run, *one_step), _FIRST_STEP),
                _TORCH: (("-c", _TORCH), None),
            }
            for name in list(words)[:: 1 if done % 2 else -1]:
                seconds = _seconds(*words[name], threads)
                if done:
                    times[name].append(seconds)
    print(f"start: {_CONFIG}, {threads} threads, seconds from the command to its end, or to what is named")
    for name, measured in times.items():
        low, middle, high = quartiles(measured)
        one, two, three = quartiles([a / b for a, b in zip(measured, times[_TORCH], strict=True)])
        print(
            f"  {name:16} {middle:6.2f} s ({low:.2f} to {high:.2f}), / {_TORCH}: {two:.2f} ({one:.2f} to {three:.2f})"
        )


def _seconds(words: Sequence[str], awaited: str | None, threads: int) -> float:
    """From the start of a process to a line that says what is awaited, or to its end."""
    # As in any start but the first.
    kept = {key: value for key, value in os.environ.items() if key != "PYTHONDONTWRITEBYTECODE"}
    environment = {**kept, "OMP_NUM_THREADS": str(threads), "PYTHONUNBUFFERED": "1"}
    begin = time.perf_counter()
    with subprocess.Popen(
        [sys.executable, *words],
        cwd=_ROOT,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    ) as process:
        assert process.stdout is not None
        said = ""
        for line in process.stdout:
            said += line
            if awaited is not None and awaited in line:
                seconds = time.perf_counter() - begin
                process.kill()
                return seconds
        if process.wait() or awaited is not None:
            raise RuntimeError(f"{' '.join(words)} failed: {said}")
    return time.perf_counter() - begin

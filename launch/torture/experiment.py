"""A campaign: the run that is disturbed, the moments, and what is said of them."""

from __future__ import annotations

import argparse
import json
import math
import random
import re
import shutil
import statistics
import tempfile
import time
from dataclasses import asdict, dataclass, field
from itertools import takewhile
from pathlib import Path
from typing import Any

from data_pipelines.config import DataConfig
from engine.config import ConfigError, RunConfig
from engine.config.loading import dump, validate
from engine.files import write_json
from engine.safety import checkpoint, loading
from launch.entry import user_errors
from launch.torture.disturbances import KINDS, Kind
from launch.torture.gang import PATIENCE, Gang, UnexpectedError
from launch.torture.verdicts import damaged, problems_at_rest, verdicts

EVERY = 10
"""Steps between checkpoints."""

STEPS_PER_EPOCH = 100
"""12,000 images in batches of 120, which 1 to 4 ranks divide."""

SUBSET = DataConfig(dataset="fashion_mnist_subset", global_batch=1).folder


def run(options: argparse.Namespace) -> int:
    """Disturbs, and compares. Returns: the exit code."""
    with user_errors():
        if max(options.ranks) > 4:
            raise ConfigError(f"--ranks {max(options.ranks)}: expected 1 to 4, which divide the batch of 120 images")
        if options.folder and options.folder.exists() and _Progress.read(options.folder, _asked(options)) is None:
            raise ConfigError(
                f"--folder {options.folder}: is there already; expected a new one, or that of a campaign with the same "
                "--kills, --ranks and --seed"
            )
    folder = (options.folder or Path(tempfile.mkdtemp(prefix="torture-"))).absolute()
    wrong = torture(options, folder)
    if options.folder is None and not wrong:
        shutil.rmtree(folder)
    elif wrong:
        print(f"the runs and what they said are in {folder}")
    return int(bool(wrong))


def the_run(folder: Path, name: str, ranks: list[int], kills: int) -> RunConfig:
    """An epoch, and another for every 5 disturbances."""
    network: dict[str, Any] = {"network": "cifar_resnet8_b", "options": {"width": 4}}
    if len(set(ranks)) > 1:
        shape = {"img_size": 28, "patch_size": 7, "embed_dim": 24, "num_heads": 2, "depth": 1}
        pooled = {"class_token": False, "global_pool": "avg"}
        network = {"network": "timm/vit_tiny_patch16_224", "options": {**shape, **pooled}}
    return validate(
        {
            "name": name,
            "dir": str(folder / name),
            "device": "cpu",
            "method": {"name": "dml"},
            "peers": [{**network, "name": "peer", "copies": 3}],
            "data": {"dataset": "fashion_mnist", "root": str(folder / "data"), "global_batch": 120},
            "train": {"epochs": 1 + math.ceil(kills / 5), "ema_decay": 0.9, "timeout": 15.0},
            "optimizer": {"lr": 0.05 if len(set(ranks)) == 1 else 0.005},
            "checkpoint": {"every_steps": EVERY},
            "log": {"every_steps": 1, "progress": False},
        }
    )


# -- the campaign -----------------------------------------------------------------------------------------------------


def _asked(options: argparse.Namespace) -> dict[str, Any]:
    """What must be the same for a campaign to go on."""
    return {"kills": options.kills, "ranks": options.ranks, "seed": options.seed}


@dataclass
class _Progress:
    """How far a campaign has come."""

    asked: dict[str, Any]
    undisturbed: bool = False
    """Whether the run to compare with has come to its end."""
    done: int = 0
    """Disturbances."""
    resumed: int = 0
    """The step that the disturbed run went on from last."""
    damaged: list[int] = field(default_factory=list)
    """Steps of checkpoints that were damaged."""
    seconds: dict[str, list[float]] = field(default_factory=dict)
    """Until the first step after each disturbance of a kind."""
    wrong: list[str] = field(default_factory=list)
    starts: int = 0

    @classmethod
    def read(cls, folder: Path, asked: dict[str, Any]) -> _Progress | None:
        """That of a folder, None where it is not one of such a campaign."""
        try:
            found = cls(**json.loads((folder / "progress.json").read_text(encoding="utf-8")))
        except (OSError, ValueError, TypeError):
            return None
        return found if found.asked == asked else None

    def write(self, folder: Path) -> None:
        write_json(folder / "progress.json", asdict(self))


def torture(options: argparse.Namespace, folder: Path) -> list[str]:
    """Trains both runs, and prints what happens. Returns: what is wrong."""
    runs = {name: the_run(folder, name, options.ranks, options.kills) for name in ("undisturbed", "disturbed")}
    progress = _Progress.read(folder, _asked(options))
    if progress is None:
        progress = _Progress(_asked(options))
        shutil.copytree(SUBSET, folder / "data")
        for name, config in runs.items():
            (folder / f"{name}.yaml").write_text(dump(config), encoding="utf-8")
        progress.write(folder)
    exact, steps = len(set(options.ranks)) == 1, _steps(runs["disturbed"])
    print(f"{options.kills} disturbances in {steps} steps, seed {options.seed}; {folder}", flush=True)
    complete = False
    try:
        if not progress.undisturbed:
            _train_undisturbed(folder, options.ranks[0], steps, progress)
        complete = _disturb(options, folder, steps, exact, progress)
    except UnexpectedError as error:
        progress.wrong.append(str(error))
    print(_table(progress.seconds), flush=True)
    if complete:
        epochs = runs["disturbed"].train.epochs_of(STEPS_PER_EPOCH)
        for claim, problem in verdicts(folder, runs["disturbed"], epochs, exact):
            print(f"{'WRONG' if problem else 'ok':5}  {claim}", flush=True)
            progress.wrong += [problem] if problem else []
    return _told(progress.wrong)


def _train_undisturbed(folder: Path, ranks: int, steps: int, progress: _Progress) -> None:
    begin, run = time.monotonic(), folder / "undisturbed"
    if run.exists():  # of a campaign that was ended
        shutil.rmtree(run)
    gang = Gang(folder / "undisturbed.yaml", ranks, 0, _log(folder, "undisturbed", progress))
    try:
        if code := gang.end(PATIENCE * (1 + steps // STEPS_PER_EPOCH)):
            raise UnexpectedError(f"the undisturbed run ended with {code}; see {gang.output}")
    finally:
        gang.kill()
    progress.undisturbed = True
    progress.write(folder)
    print(f"undisturbed on {ranks}: {time.monotonic() - begin:.0f} s", flush=True)


def _told(wrong: list[str]) -> list[str]:
    for problem in wrong:
        print(f"wrong: {problem}", flush=True)
    return wrong


def _steps(config: RunConfig) -> int:
    return config.train.steps(STEPS_PER_EPOCH)


def _disturb(options: argparse.Namespace, folder: Path, steps: int, exact: bool, progress: _Progress) -> bool:
    """Trains the run that is disturbed to its end, or to the first thing that is wrong. Returns: whether to its end."""
    draw = random.Random(options.seed)
    deck = _dealt([kind for kind in KINDS if max(options.ranks) > 1 or not kind.company], options.kills, draw)
    moments = _moments(steps, options.kills, draw)
    gang = _start(folder, deck[progress.done :], options, progress)
    struck = gang
    try:
        if checkpoint.steps_on_disk(gang.run):  # A campaign goes on.
            progress.resumed = _going_on(gang, 0)
        while progress.done < options.kills:
            number, kind = progress.done + 1, deck[progress.done]
            rng = random.Random(f"{options.seed} {number}")
            # A checkpoint after the one that it went on from: the run shall come to its end.
            _wait_for_step(gang, max(moments[progress.done], progress.resumed + EVERY + 2))
            time.sleep(rng.uniform(0, 0.1))
            spoken, expected, must_say, problems = gang.spoken(), None, "", list[str]()
            struck, blow = gang, kind.strike(gang, rng)
            if not kind.heals and not kind.passes:
                problems += problems_at_rest(gang, folder, progress.damaged, exact, still_there=bool(kind.returns))
                if kind.spoils:
                    blow.found, must_say = kind.spoils(gang, rng)
                newest, _ = loading.newest(gang.run)
                expected, progress.damaged = newest and newest.step, list(damaged(gang.run))
                gang, spoken = _start(folder, deck[number:], options, progress), 0
            if kind.passes:
                _wait_for_step(gang, gang.step() + 2)
            else:
                progress.resumed = _going_on(gang, spoken)
            took = time.monotonic() - blow.moment
            progress.seconds.setdefault(kind.name, []).append(took)
            if kind.returns:
                blow.found = kind.returns(struck, gang)
                _wait_for_step(gang, gang.step() + 2)
            if expected not in (None, progress.resumed):
                problems.append(f"it went on at step {progress.resumed}, expected {expected}")
            if must_say not in gang.said():
                problems.append(f"it did not say {must_say!r}")
            how = "trained on" if kind.passes else f"went on at {progress.resumed:4}"
            print(
                f"{number:3}/{options.kills}  {kind.name:20}  {blow.target:8} of {struck.ranks}  step {blow.step:4}  "
                f"{how} on {gang.ranks}  {took:5.1f} s  {'; '.join(filter(None, [blow.found, *problems]))}",
                flush=True,
            )
            progress.wrong += [f"{number}, {kind.name}: {problem}" for problem in problems]
            progress.done = number
            progress.write(folder)
            if problems and not options.keep_going:
                return False
        if code := gang.end(PATIENCE * (1 + steps // STEPS_PER_EPOCH)):
            raise UnexpectedError(f"the last start ended with {code}; see {gang.output}")
        return True
    finally:
        for one in (struck, gang):
            one.kill()


def _moments(steps: int, count: int, rng: random.Random) -> list[int]:
    """Steps to disturb: one at random in each of equal parts of the run, but for its first and last checkpoints."""
    first, last = 2 * EVERY + 5, steps - 4 * EVERY
    return [first + int((last - first) * (part + rng.random()) / count) for part in range(count)]


def _dealt(kinds: list[Kind], count: int, rng: random.Random) -> list[Kind]:
    """Each once before any comes again."""
    dealt: list[Kind] = []
    while len(dealt) < count:
        dealt += rng.sample(kinds, len(kinds))
    return dealt[:count]


def _start(folder: Path, deck: list[Kind], options: argparse.Namespace, progress: _Progress) -> Gang:
    """A gang that outlives the disturbances that torchrun answers by itself, and not one more."""
    endured = list(takewhile(lambda kind: kind.heals or kind.passes, deck))
    company = any(kind.company for kind in deck[: len(endured) + 1])
    rng = random.Random(f"{options.seed} {progress.starts}")
    drawn = rng.choice([n for n in options.ranks if n > 1 or not company])
    restarts = sum(kind.heals for kind in endured)
    return Gang(folder / "disturbed.yaml", drawn, restarts, _log(folder, f"after_{progress.done}", progress))


def _log(folder: Path, name: str, progress: _Progress) -> Path:
    """A new file for what a start prints."""
    progress.starts += 1
    progress.write(folder)
    return folder / f"{progress.starts:03}_{name}.log"


def _wait_for_step(gang: Gang, step: int) -> None:
    gang.wait_until(lambda: gang.step() >= step, f"step {step}")


def _going_on(gang: Gang, since: int) -> int:
    """Waits for the first step of the ranks that were started. Returns: the step that they went on from."""
    told = r"going on at step (\d+) of"
    gang.wait_until(lambda: re.search(told, gang.said(since)), "the word that the run goes on")
    found = re.search(told, gang.said(since))
    assert found
    _wait_for_step(gang, int(found[1]) + 1)
    return int(found[1])


def _table(seconds: dict[str, list[float]]) -> str:
    lines = [f"{'disturbance':20}  times  seconds until the next step: median, longest"]
    for kind in KINDS:
        if took := seconds.get(kind.name):
            lines.append(f"{kind.name:20}  {len(took):5}  {statistics.median(took):6.1f}  {max(took):6.1f}")
    every = [second for took in seconds.values() for second in took]
    if every:
        lines.append(f"{'all':20}  {len(every):5}  {statistics.median(every):6.1f}  {max(every):6.1f}")
    return "\n".join(lines)

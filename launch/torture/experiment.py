"""Disturbs a run at random moments, as often as asked, and compares what it comes to with the same run undisturbed.

    python launch/torture                          20 times, on 3 ranks: equal to the last bit
    python launch/torture --ranks 3 1 2 4          starts on a number of ranks drawn from these: equal to tolerance
    python launch/torture --kills 5 --seed 7       fewer, and others

The run is real: launch/train.py under torchrun, three networks that teach each other by DML on the 12,000 images that
come with Cohort, 100 steps an epoch, with a line of metrics every step and a checkpoint every 10. The disturbances:

    kill a rank           SIGKILL; torchrun starts all ranks again by itself
    kill a rank for good  SIGKILL; torchrun may not, and must end with an error
    SIGTERM to torchrun   the step must be saved, all must end
    SIGUSR1 to a rank     likewise, with exit code 0
    stop a rank           SIGSTOP; the others must name it and end; then all are killed
    kill in a write       SIGKILL to all while a checkpoint is being written
    kill torchrun         SIGKILL; no rank may live on
    full disk             no file can grow (RLIMIT_FSIZE): training must go on and say so; then all are killed
    damage                all are killed, and a file of the newest checkpoint is cut short or has a bit turned
    half a line           all are killed, and metrics.jsonl ends in the middle of a line

Each comes up once before any comes up again. After each one the lines of metrics must be those of the undisturbed run,
without gap or repeat, and every checkpoint whole but the one that was damaged.

That every sample is seen exactly once an epoch follows from two things that are checked: the order is a function of the
step alone and shows each sample once an epoch (drawn here from the pipeline itself), and the losses of each step are
those of the undisturbed run, bit for bit, or to tolerance on other ranks, which no other samples would give.

On one number of ranks the networks are ResNets with BatchNorm. BatchNorm sees the rows of one rank, so where the number
of ranks changes they are small transformers, and slow learners: rounding grows with every step of a restless network.
"""

from __future__ import annotations

import argparse
import math
import random
import re
import shutil
import statistics
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import takewhile
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from data_pipelines import open_pipeline
from engine.config import ConfigError, RunConfig
from engine.config.loading import dump, validate
from engine.ranks.collectives import Launch
from engine.reporting.tracking import read_metrics
from engine.safety import checkpoint, loading
from engine.safety.checkpoint import CheckpointError
from launch.entry import parser, user_errors
from launch.torture.disturbances import KINDS, Kind
from launch.torture.gang import Gang, UnexpectedError

EPILOG = "Exit codes: 0 all is as if nothing had happened, 1 something is not, 2 a mistake in the command line."

EVERY = 10
"""Steps between checkpoints."""

STEPS_PER_EPOCH = 100
"""12,000 images in batches of 120, which 1 to 4 ranks divide."""

WEIGHTS, MOMENTS, LINES = 1e-5, 1e-4, 1e-3
"""Relative tolerances where the number of ranks changes. A gradient near an optimum is a small difference of large
numbers, and so is the divergence of peers that agree."""

COUNTED, IMAGES = ("top1", "top5", "disagreement"), 0.11
"""There, figures that count images may differ by so many percent: two of 2,000, whose two best classes are as near."""


def main() -> None:
    """The command."""
    arguments = parser(__doc__ or "", EPILOG)
    arguments.add_argument("--kills", type=_positive, default=20, metavar="N", help="disturbances (default: 20)")
    arguments.add_argument(
        "--ranks",
        type=_positive,
        nargs="+",
        default=[3],
        metavar="N",
        help="numbers of ranks, of 1 to 4, that starts are drawn from; the undisturbed run has the first (default: 3)",
    )
    arguments.add_argument("--seed", type=int, default=0, help="of kinds, ranks and moments (default: 0)")
    arguments.add_argument("--folder", type=Path, help="new, for both runs; a temporary one, removed if all is well")
    arguments.add_argument("--keep-going", action="store_true", help="do not end at the first thing that is wrong")
    options = arguments.parse_args()
    with user_errors(Launch.from_environment()):
        if max(options.ranks) > 4:
            raise ConfigError(f"--ranks {max(options.ranks)}: expected 1 to 4, which divide the batch of 120 images")
        if options.folder and options.folder.exists():
            raise ConfigError(f"--folder {options.folder}: is there already; expected a new one")
    folder = (options.folder or Path(tempfile.mkdtemp(prefix="torture-"))).absolute()
    wrong = torture(options, folder)
    if options.folder is None and not wrong:
        shutil.rmtree(folder)
    elif wrong:
        print(f"the runs and what they said are in {folder}")
    sys.exit(bool(wrong))


def _positive(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"expected a number of at least 1, found {text!r}")
    return int(text)


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
            "data": {"dataset": "fashion_mnist_subset", "global_batch": 120},
            "train": {"epochs": 1 + math.ceil(kills / 5), "ema_decay": 0.9, "timeout": 15.0},
            "optimizer": {"lr": 0.05 if len(set(ranks)) == 1 else 0.005},
            "checkpoint": {"every_steps": EVERY},
            "log": {"every_steps": 1, "progress": False},
        }
    )


# -- the campaign -----------------------------------------------------------------------------------------------------


@dataclass
class Findings:
    """What is wrong, and the seconds until the first step after each disturbance of a kind."""

    wrong: list[str] = field(default_factory=list)
    seconds: dict[str, list[float]] = field(default_factory=dict)
    complete: bool = False
    """Whether the disturbed run came to its end."""


def torture(options: argparse.Namespace, folder: Path) -> list[str]:
    """Trains both runs, and prints what happens. Returns: what is wrong."""
    runs = {name: the_run(folder, name, options.ranks, options.kills) for name in ("undisturbed", "disturbed")}
    for name, config in runs.items():
        (folder / name).mkdir(parents=True)
        (folder / f"{name}.yaml").write_text(dump(config), encoding="utf-8")
    exact = len(set(options.ranks)) == 1
    print(
        f"{options.kills} disturbances in {_steps(runs['disturbed'])} steps, seed {options.seed}; {folder}", flush=True
    )

    findings = Findings()
    since = time.monotonic()
    gang = Gang(folder / "undisturbed.yaml", options.ranks[0], 0, folder / "undisturbed.log")
    try:
        if gang.end():
            findings.wrong.append(f"the undisturbed run failed; see {folder / 'undisturbed.log'}")
            return _told(findings.wrong)
    finally:
        gang.kill()
    print(f"undisturbed on {gang.ranks} ranks: {time.monotonic() - since:.0f} s, its start included\n", flush=True)
    try:
        _disturb(options, folder, _steps(runs["disturbed"]), exact, findings)
    except UnexpectedError as error:
        findings.wrong.append(str(error))
    print(f"\n{_table(findings)}\n")
    if findings.complete:
        for claim, problem in _verdicts(folder, runs["disturbed"], exact):
            print(f"{'WRONG' if problem else 'ok':5}  {claim}", flush=True)
            findings.wrong += [problem] if problem else []
    return _told(findings.wrong)


def _told(wrong: list[str]) -> list[str]:
    for problem in wrong:
        print(f"wrong: {problem}", flush=True)
    return wrong


def _steps(config: RunConfig) -> int:
    return config.train.steps(STEPS_PER_EPOCH)


def _disturb(options: argparse.Namespace, folder: Path, steps: int, exact: bool, findings: Findings) -> None:
    """Trains the run that is disturbed to its end."""
    rng = random.Random(options.seed)
    deck = _dealt([kind for kind in KINDS if max(options.ranks) > 1 or not kind.company], options.kills, rng)
    run, resumed, damaged = folder / "disturbed", 0, set[int]()
    gang = _start(folder, 0, deck, options.ranks, rng)
    try:
        for number, (kind, moment) in enumerate(zip(deck, _moments(steps, options.kills, rng), strict=True), 1):
            # A checkpoint after the one that it went on from: the run shall come to its end.
            _wait_for_step(gang, max(moment, resumed + EVERY + 2))
            time.sleep(rng.uniform(0, 0.1))
            ranks, spoken, expected, must_say = gang.ranks, gang.spoken(), None, ""
            problems: list[str] = []
            blow = kind.strike(gang, rng)
            if not kind.heals:
                problems += _problems_at_rest(gang, folder, damaged, exact)
                if kind.spoils:
                    blow.found, must_say = kind.spoils(run, rng)
                newest, _ = loading.newest(run)
                expected, damaged = newest and newest.step, set(_damaged(run))
                gang, spoken = _start(folder, number, deck[number:], options.ranks, rng), 0
            resumed = _going_on(gang, spoken)
            took = time.monotonic() - blow.moment
            findings.seconds.setdefault(kind.name, []).append(took)
            if expected not in (None, resumed):
                problems.append(f"it went on at step {resumed}, expected {expected}")
            if must_say not in gang.said():
                problems.append(f"it did not say {must_say!r}")
            print(
                f"{number:3}/{options.kills}  {kind.name:20}  {blow.target:8} of {ranks}  step {blow.step:4}  went on "
                f"at {resumed:4} on {gang.ranks}  {took:5.1f} s  {'; '.join(filter(None, [blow.found, *problems]))}",
                flush=True,
            )
            findings.wrong += [f"{number}, {kind.name}: {problem}" for problem in problems]
            if problems and not options.keep_going:
                return
        if code := gang.end():
            raise UnexpectedError(f"the last start ended with {code}; see the last log in {folder}")
        findings.complete = True
    finally:
        gang.kill()


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


def _start(folder: Path, number: int, deck: list[Kind], ranks: list[int], rng: random.Random) -> Gang:
    """A gang that outlives the disturbances that torchrun answers by itself, and not one more."""
    healing = list(takewhile(lambda kind: kind.heals, deck))
    company = any(kind.company for kind in deck[: len(healing) + 1])
    drawn = rng.choice([n for n in ranks if n > 1 or not company])
    return Gang(folder / "disturbed.yaml", drawn, len(healing), folder / f"after_{number}.log")


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


# -- what must hold ---------------------------------------------------------------------------------------------------


def _problems_at_rest(gang: Gang, folder: Path, damaged: set[int], exact: bool) -> list[str]:
    """What is wrong where all processes shall have ended."""
    problems = [f"rank {rank} is still there" for rank in gang.workers()]
    problems += [text for step, text in _damaged(gang.run).items() if step not in damaged]
    difference = _difference(read_metrics(folder / "undisturbed"), read_metrics(gang.run), exact, so_far=True)
    return problems + ([difference] if difference else [])


def _damaged(run: Path) -> dict[int, str]:
    """What is wrong with each checkpoint that is not whole."""
    found = {}
    for step in checkpoint.steps_on_disk(run):
        try:
            loading.verify(checkpoint.folder_of(run, step))
        except CheckpointError as error:
            found[step] = str(error)
    return found


def _difference(
    wanted: list[dict[str, Any]], found: list[dict[str, Any]], exact: bool, so_far: bool = False
) -> str | None:
    """Of lines of metrics but for what a clock measured."""
    if len(found) > len(wanted) or (len(found) < len(wanted) and not so_far):
        return f"metrics.jsonl has {len(found)} lines, expected {len(wanted)}"
    for number, (line, other) in enumerate(zip(found, wanted, strict=False), 1):
        for key in ["step", *sorted(line.keys() | other.keys())]:
            one, two = line.get(key), other.get(key)
            if not key.startswith("speed/") and one != two and (exact or not _near(key, one, two)):
                return f"metrics.jsonl, line {number}: {key} is {one}, expected {two}"
    return None


def _near(key: str, one: Any, two: Any) -> bool:
    floats = isinstance(one, float) and isinstance(two, float)
    return floats and math.isclose(one, two, rel_tol=LINES, abs_tol=IMAGES if key.endswith(COUNTED) else 1e-5)


def _verdicts(folder: Path, config: RunConfig, exact: bool) -> Iterator[tuple[str, str | None]]:
    """Each claim, and what is wrong with it."""
    run, undisturbed = folder / "disturbed", folder / "undisturbed"
    how = "equal to the last bit" if exact else f"equal to {WEIGHTS:g}, moments to {MOMENTS:g}"
    yield (
        f"weights, moments and averages of all peers: {how}",
        _state_difference(_final(undisturbed), _final(run), exact),
    )
    lines = read_metrics(undisturbed)
    how = "bit for bit" if exact else f"to {LINES:g}"
    problem = _difference(lines, read_metrics(run), exact)
    yield f"metrics.jsonl: {len(lines)} lines, no gap, no repeat, numbers equal {how}", problem
    yield (
        f"the order shows every sample once in each of {config.train.epochs_of(STEPS_PER_EPOCH)} epochs",
        _repeats(config),
    )
    here, there = (sorted(path.name for path in (one / "checkpoints").iterdir()) for one in (run, undisturbed))
    problem = None if here == there else f"checkpoints: {', '.join(here)}; expected {', '.join(there)}"
    yield f"checkpoints: {', '.join(there)}, nothing left over", problem
    yield "every checkpoint whole", next(iter(_damaged(run).values()), None)


def _final(run: Path) -> dict[str, Any]:
    """Everything in the newest checkpoint: `file/key/key` -> tensor or plain value."""
    manifest, _ = loading.newest(run)
    assert manifest
    flat: dict[str, Any] = {"step": manifest.step, "best": manifest.best and manifest.best.step}

    def walk(value: Any, key: str) -> None:
        if isinstance(value, dict | list | tuple):
            for name, inner in value.items() if isinstance(value, dict) else enumerate(value):
                walk(inner, f"{key}/{name}")
        else:
            flat[key] = value

    for name in manifest.files:
        walk(loading.read_state(checkpoint.folder_of(run, manifest.step), name), name)
    return flat


def _state_difference(wanted: dict[str, Any], found: dict[str, Any], exact: bool) -> str | None:
    """Tensors may differ in norm to tolerance, other values not at all."""
    for key in sorted(wanted.keys() | found.keys()):
        one, two = found.get(key), wanted.get(key)
        relative = 0.0 if exact else MOMENTS if "/optimizer/" in key else WEIGHTS
        if isinstance(one, Tensor) and isinstance(two, Tensor) and one.shape == two.shape:
            off = float((one.double() - two.double()).norm())
            if off > relative * float(two.double().norm()) or (exact and not torch.equal(one, two)):
                return f"{key}: off by {off:.1e} in norm"
        elif isinstance(one, Tensor) or isinstance(two, Tensor) or one != two:
            return f"{key}: {one} instead of {two}"
    return None


def _repeats(config: RunConfig) -> str | None:
    """Samples that the order of an epoch shows twice or never."""
    pipeline = open_pipeline(config.data, config.seed, torch.device("cpu"))
    try:
        for epoch in range(config.train.epochs_of(STEPS_PER_EPOCH)):
            batches = pipeline.train(epoch, 0, slice(0, config.data.global_batch))
            seen = torch.cat([batch.ids for batch in batches]).bincount(minlength=pipeline.train_size)
            if not bool((seen == 1).all()):
                return f"epoch {epoch}: {int((seen != 1).sum())} samples not seen exactly once"
    finally:
        pipeline.close()
    return None


def _table(findings: Findings) -> str:
    lines = [f"{'disturbance':20}  times  seconds until the next step: median, longest"]
    for kind in KINDS:
        if seconds := findings.seconds.get(kind.name):
            lines.append(f"{kind.name:20}  {len(seconds):5}  {statistics.median(seconds):6.1f}  {max(seconds):6.1f}")
    every = [second for seconds in findings.seconds.values() for second in seconds]
    if every:
        lines.append(f"{'all':20}  {len(every):5}  {statistics.median(every):6.1f}  {max(every):6.1f}")
    return "\n".join(lines)


if __name__ == "__main__":
    main()

"""The command that disturbs a run, and whether it would notice."""

from __future__ import annotations

import copy
import random
import subprocess
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch

from launch.torture.disturbances import KINDS
from launch.torture.experiment import EVERY, _dealt, _moments
from launch.torture.verdicts import _difference, _state_difference
from tests.launch.command import run_command

ROOT = Path(__file__).parents[2]


@pytest.mark.slow
@pytest.mark.timeout(1200)
@pytest.mark.parametrize("ranks", [["3"], ["3", "1", "2", "4"]], ids=["3 ranks", "1 to 4 ranks"])
def test_a_run_that_is_disturbed_ends_as_the_undisturbed_one(tmp_path: Path, ranks: list[str]) -> None:
    seed = random.SystemRandom().randrange(10**6)
    command = [sys.executable, "launch/torture", "--kills", "5", "--seed", str(seed), "--ranks", *ranks]
    done = subprocess.run([*command, "--folder", str(tmp_path / "runs")], cwd=ROOT, capture_output=True, text=True)
    print(done.stdout)
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.count("\nok ") == 5


def test_every_kind_comes_before_any_comes_again_and_each_at_its_own_time() -> None:
    for seed in range(20):
        rng = random.Random(seed)
        assert set(Counter(kind.name for kind in _dealt(list(KINDS), 2 * len(KINDS), rng)).values()) == {2}
        moments = _moments(500, 20, rng)
        assert moments == sorted(moments)
        assert moments[0] >= 2 * EVERY
        assert moments[-1] <= 500 - 4 * EVERY


LINES: list[dict[str, Any]] = [
    {"step": step, "train/peer-0/ce": 1 / step, "speed/data_ms": float(step)} for step in range(1, 6)
]


@pytest.mark.parametrize("exact", [True, False])
def test_a_gap_a_repeat_and_another_number_in_the_metrics_are_noticed(exact: bool) -> None:
    assert _difference(LINES, copy.deepcopy(LINES), exact) is None
    assert _difference(LINES, LINES[:3], exact, so_far=True) is None
    assert _difference(LINES, [{**line, "speed/data_ms": 0.0} for line in LINES], exact) is None
    assert _difference(LINES, LINES[:4], exact) == "metrics.jsonl has 4 lines, expected 5"
    assert _difference(LINES, [*LINES[:2], *LINES[3:]], exact, so_far=True) == (
        "metrics.jsonl, line 3: step is 4, expected 3"
    )
    assert _difference(LINES, [*LINES[:2], *LINES[1:]], exact) == "metrics.jsonl has 6 lines, expected 5"
    assert _difference(LINES, [*LINES[:2], *LINES[1:4]], exact) == "metrics.jsonl, line 3: step is 2, expected 3"
    other = [*LINES[:4], {**LINES[4], "train/peer-0/ce": 0.21}]
    assert _difference(LINES, other, exact) == "metrics.jsonl, line 5: train/peer-0/ce is 0.21, expected 0.2"


def test_rounding_in_the_metrics_is_a_difference_on_the_same_ranks_only() -> None:
    rounded = [*LINES[:4], {**LINES[4], "train/peer-0/ce": 0.2000001}]
    assert _difference(LINES, rounded, exact=False) is None
    assert _difference(LINES, rounded, exact=True) is not None


def test_two_images_of_2000_are_a_difference_on_the_same_ranks_only() -> None:
    wanted = [{"step": 1, "val/peer-0/top1": 35.0}]
    for top1, exact, differs in ((35.1, False, False), (35.15, False, True), (35.05, True, True)):
        found = [{"step": 1, "val/peer-0/top1": top1}]
        assert (_difference(wanted, found, exact) is not None) == differs


def test_a_bit_of_a_weight_is_noticed() -> None:
    wanted: dict[str, Any] = {"step": 5, "peer_a.pt/network/w": torch.ones(3)}
    other = {**wanted, "peer_a.pt/network/w": torch.tensor([1.0, 1.0, 1.0 + 2**-23])}
    assert _state_difference(wanted, copy.deepcopy(wanted), exact=True) is None
    assert _state_difference(wanted, other, exact=True) == "peer_a.pt/network/w: off by 1.2e-07 in norm"
    assert _state_difference(wanted, other, exact=False) is None
    assert _state_difference(wanted, {**wanted, "peer_a.pt/network/w": torch.full((3,), 1.01)}, exact=False) is not None
    assert _state_difference(wanted, {**wanted, "step": 6}, exact=False) == "step: 6 instead of 5"
    assert _state_difference(wanted, {"step": 5}, exact=False) is not None


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--ranks", "5"], "--ranks 5: expected 1 to 4, which divide the batch of 120 images"),
        (["--kills", "0"], "argument --kills: expected a number of at least 1, found '0'"),
        (["--folder", "."], "--folder .: is there already; expected a new one, or that of a campaign"),
    ],
)
def test_mistakes_are_told_before_anything_is_started(arguments: list[str], message: str) -> None:
    code, _, said = run_command("torture.__main__", *arguments, check=False)
    assert code == 2
    assert message in said

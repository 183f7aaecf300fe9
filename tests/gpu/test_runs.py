"""What runs do on a GPU beside their steps: several ranks on it, checkpoints, evaluation, decoding, compilation."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from tests.gpu.cases import CASES
from tests.gpu.checks import assert_close, assert_terms_close, whole
from tests.gpu.jobs import RESUMED, SPREAD, SYNCHRONISED

pytestmark = pytest.mark.gpu

Done = Callable[[str], Any]
STD = torch.tensor([0.229, 0.224, 0.225]).view(3, 1, 1)


@pytest.mark.parametrize("job", ["two ranks over gloo", "two ranks over NCCL"])
@pytest.mark.parametrize("case", SPREAD)
def test_two_ranks_on_one_gpu_give_the_numbers_of_one(case: str, job: str, done: Done, found: Done) -> None:
    ranks = done(job)
    if ranks is None:
        pytest.skip("before 2.30, NCCL takes no two ranks on one GPU")
    expected = whole(found(case)["device"])["state"]
    joined = {name: x for rank in ranks for name, x in rank[case].items()}
    assert_close(joined, expected, CASES[case].tolerance)


@pytest.mark.parametrize("job", [f"resumed {name}" for name in RESUMED])
def test_a_run_that_goes_on_after_its_first_epoch_ends_like_one_that_never_stopped(job: str, done: Done) -> None:
    whole_run, resumed = done(job)
    # cuDNN chooses its algorithms anew in each process; losing the momentum would show in the first digit.
    assert_close(resumed, whole_run, 1e-2)


@pytest.mark.parametrize("job", ["saving"])
def test_a_checkpoint_written_beside_training_is_of_the_moment_of_its_save(job: str, done: Done) -> None:
    found = done(job)
    assert found["damaged"] == []
    assert found["step"] == 5
    assert found["moved"]
    assert_close(found["saved"], found["then"], 0.0)


@pytest.mark.parametrize("job", ["evaluation", "evaluation, augmented"])
def test_evaluation_counts_every_image_and_names_the_classes_that_the_cpu_names(job: str, done: Done) -> None:
    found = done(job)
    here, cpu = found["device"], found["cpu"]
    assert here.keys() == cpu.keys()
    for name, expected in cpu.items():
        exact = name.endswith(("top1", "top5", "disagreement"))
        assert here[name] == pytest.approx(expected, rel=1e-6 if exact else 1e-3, abs=1e-4), name
    for mine, theirs in zip(found["batch, device"], found["batch, cpu"], strict=True):
        # Where a pixel's value lies between two numbers, devices may round it to either.
        off = ((mine - theirs).abs() > 1e-5).float().mean()
        assert off <= (0.01 if "augmented" in job and mine.ndim == 4 else 0.0), f"{100 * off:.2f} % of numbers differ"


@pytest.mark.parametrize("job", ["decoders"])
def test_the_gpu_decodes_the_pixels_of_the_cpu(job: str, done: Done) -> None:
    found = done(job)
    if found is None:
        pytest.skip("DALI is not installed")
    mixed, cpu = found
    for place in (0, 3):
        steps = (mixed[place] - cpu[place]).abs() * STD * 255
        # Other rounding in the inverse transform, the colours and the resampling: a step or two of 255, seldom more.
        assert steps.mean() < 1.0
        assert (steps > 4).float().mean() < 0.01
        assert torch.equal(mixed[place + 1], cpu[place + 1])
        assert torch.equal(mixed[place + 2], cpu[place + 2])


@pytest.mark.parametrize("job", ["compiled dml", "compiled lmcl", "compiled pcl"])
def test_compiled_networks_give_the_terms_of_eager_ones(job: str, done: Done) -> None:
    found = done(job)
    # Of the first step, and of those after updates by gradients that are rounded otherwise.
    assert_terms_close(found["compiled"][:1], found["eager"][:1], 1e-3)
    assert_terms_close(found["compiled"], found["eager"], 1e-2)


@pytest.mark.parametrize("job", ["pipeline, augmented", *(f"pipeline {amp}" for amp in ("float32", "bf16", "fp16"))])
def test_training_on_resident_images_never_waits_and_learns(job: str, done: Done) -> None:
    losses = done(job)
    assert sum(losses[-5:]) < sum(losses[:5])


@pytest.mark.parametrize("job", [f"synchronised {name}" for name in SYNCHRONISED])
def test_replicas_that_share_statistics_give_the_numbers_of_one(job: str, done: Done, device: str) -> None:
    if device != "cuda":
        pytest.skip("SyncBatchNorm works on CUDA devices only")
    together, alone = done(job)
    assert_close(together, alone, SYNCHRONISED[job.partition(" ")[2]].tolerance)


@pytest.mark.parametrize("job", ["twins mcl_batch", "twins mcl_global"])
def test_peers_that_show_the_same_have_nothing_to_teach_each_other(job: str, done: Done) -> None:
    """KL(x, x) = 0 of products divided by 0.07, where networks may compute in TF32."""
    terms = done(job)
    soft = {name: x for name, x in terms.items() if "soft" in name}
    assert soft
    assert max(abs(x) for x in soft.values()) < 1e-6, soft
    assert all(x > 0.1 for name, x in terms.items() if name.endswith("/ce"))

"""Promises 3, 5 and 6 for MCL and L-MCL, on whole runs: killed, resumed elsewhere, exported, refused."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Collection
from pathlib import Path
from typing import Any

import pytest
import torch

import models
from engine.config import ConfigError, RunConfig
from engine.config.loading import dump
from engine.preflight import check_run
from engine.ranks.collectives import Launch
from engine.reporting.tracking import read_metrics
from engine.safety import checkpoint, loading
from engine.safety.checkpoint import CheckpointError
from tests.kills import assert_same_state, final_state, kill_after_step, numbers
from tests.launch.command import run_command
from tests.marks import often, slow
from tests.runs import small_run, train_here, weights
from tests.worlds import run_ranks

ROOT = Path(__file__).parents[3]
MEMORY = {"negatives": "memory", "num_negatives": 64, "width": 16}
METHODS: dict[str, dict[str, Any]] = {
    "mcl": {"name": "mcl", **MEMORY},
    "mcl_sharded": {"name": "mcl", **MEMORY, "bank_sharded": True},
    "lmcl": {"name": "lmcl", "width": 16, "meta_interval": 2},
    "lmcl_memory": {"name": "lmcl", **MEMORY, "meta_interval": 2, "bank_dtype": "bf16"},
}


def a_run(tiny: Path, folder: Path, method: str, peers: Any = 2, **sections: Any) -> RunConfig:
    """Two epochs of 5 steps; a line of metrics every step, a checkpoint every 3."""
    sections = {"checkpoint": {"every_steps": 3, "keep": 9}, "log": {"every_steps": 1}, **sections}
    return small_run(tiny, folder, METHODS[method], peers, **sections)


@pytest.fixture(scope="module")
def undisturbed(tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """The folder of a run that nobody killed, once for each (method, ranks)."""
    done: dict[Any, Path] = {}

    def train(method: str, ranks: int) -> Path:
        if (method, ranks) not in done:
            done[method, ranks] = tmp_path_factory.mktemp("undisturbed")
            run_ranks(ranks, train_here, a_run(tiny, done[method, ranks], method))
        return done[method, ranks]

    return train


def whole_banks(state: dict[str, Any]) -> dict[str, Any]:
    """The state of a run with the parts of its tables put together, as a run that keeps them whole has it."""
    state = dict(state)
    for key in sorted(key for key in state if key.startswith("tables_")):
        name = key.partition("/")[2]
        whole = state.get(f"table/{name}", state[key][:0])
        state[f"table/{name}"] = torch.cat([whole, state.pop(key)])
    return state


@pytest.mark.parametrize("method", often(METHODS, "mcl_sharded"))
def test_a_killed_run_ends_with_the_same_bits_and_its_peers_leave_as_plain_networks(
    tiny: Path, tmp_path: Path, undisturbed: Any, method: str
) -> None:
    config = a_run(tiny, tmp_path, method)
    kill_after_step(2, config, 5)
    run_ranks(2, train_here, config)
    state = final_state(tmp_path)
    assert_same_state(state, final_state(undisturbed(method, 2)))
    assert numbers(tmp_path) == numbers(undisturbed(method, 2))
    banks = [x for key, x in whole_banks(state).items() if key.startswith("table/")]
    assert [x.shape for x in banks] == ([(120, 16)] * 2 if "negatives" in METHODS[method] else [])
    outer = {key for key in state if key.startswith("peer_cifar_resnet8_b-0.pt/outer/state/")}
    assert bool(outer) == method.startswith("lmcl")

    run_command("export", str(tmp_path))
    trained = weights(tmp_path)
    for path in (tmp_path / "export").glob("*.json"):
        network = models.load_network(path)
        assert type(network) is type(models.create("cifar_resnet8_b", 10, 1, width=4))
        assert network.state_dict().keys() == models.create("cifar_resnet8_b", 10, 1, width=4).state_dict().keys()
        assert all(torch.equal(x, trained[f"{path.stem}/{name}"]) for name, x in network.state_dict().items())


def but(state: dict[str, Any], some: Collection[str]) -> dict[str, Any]:
    return {key: x for key, x in state.items() if key not in some}


def forget(folder: Path, step: int) -> None:
    """Takes away the checkpoints after a step, as if the run had been killed soon after it."""
    for later in checkpoint.steps_on_disk(folder):
        if later > step:
            shutil.rmtree(checkpoint.folder_of(folder, later))


# L-MCL's sums of many losses round so that a unit of these tiny networks turns over within a few steps: it goes on by
# one step, which has an outer one. Longer ways are compared in float64, in test_contrastive.py.
@pytest.mark.parametrize(
    ("method", "step", "after", "kind", "sharded"),
    [
        slow("mcl", 6, 1, "colocated", False),
        ("mcl", 6, 2, "spread", True),
        slow("mcl_sharded", 6, 1, "colocated", True),
        ("mcl_sharded", 6, 1, "colocated", False),
        slow("lmcl", 9, 1, "colocated", False),
        slow("lmcl_memory", 9, 1, "colocated", False),
    ],
)
def test_a_killed_run_goes_on_elsewhere_and_with_its_banks_held_otherwise(
    tiny: Path, tmp_path: Path, undisturbed: Any, method: str, step: int, after: int, kind: str, sharded: bool
) -> None:
    shutil.copytree(undisturbed(method, 2), tmp_path, dirs_exist_ok=True)
    forget(tmp_path, step)
    config = a_run(tiny, tmp_path, method, placement={"kind": kind})
    if "negatives" in METHODS[method]:
        config = config.model_copy(update={"method": config.method.model_copy(update={"bank_sharded": sharded})})
    run_ranks(after, train_here, config)
    expected = whole_banks(final_state(undisturbed(method, 2)))
    found = whole_banks(final_state(tmp_path))
    # A bank's rows are as exact as bf16 is; an outer gradient has come through second derivatives of float32.
    coarse = {key for key, x in expected.items() if isinstance(x, torch.Tensor) and x.dtype == torch.bfloat16}
    outer = {key for key in expected if "/outer/state/" in key}
    assert_same_state(but(found, coarse | outer), but(expected, coarse | outer), 1e-5)
    assert_same_state(but(found, found.keys() - outer), but(expected, expected.keys() - outer), 2e-4)
    for key in coarse:
        assert (found[key] != expected[key]).float().mean() < 1e-2
    assert [line["step"] for line in numbers(tmp_path)] == [line["step"] for line in numbers(undisturbed(method, 2))]


@pytest.mark.slow
@pytest.mark.parametrize("method", ["mcl_sharded", "lmcl"])
def test_four_ranks_go_on_as_two_replicas_of_everything(tiny: Path, tmp_path: Path, method: str) -> None:
    run_ranks(4, train_here, a_run(tiny, tmp_path / "one", method))
    shutil.copytree(tmp_path / "one", tmp_path / "other")
    forget(tmp_path / "other", 9)
    run_ranks(2, train_here, a_run(tiny, tmp_path / "other", method, placement={"kind": "colocated"}))
    expected = whole_banks(final_state(tmp_path / "one"))
    assert_same_state(whole_banks(final_state(tmp_path / "other")), expected, 1e-5)


def test_files_of_the_parts_and_what_the_manifest_says_of_them(undisturbed: Any) -> None:
    """No bank is in shared.pt, and the two ranks' rows, in order, are those of the run that keeps its banks whole."""
    one, other = (checkpoint.folder_of(undisturbed(method, 2), 10) for method in ("mcl", "mcl_sharded"))
    tables = [
        sorted(name for name in loading.verify(folder).files if name.startswith("tables")) for folder in (one, other)
    ]
    assert tables == [["tables_00000_of_00001.pt"], ["tables_00000_of_00002.pt", "tables_00001_of_00002.pt"]]
    whole = loading.read_state(one, tables[0][0])
    parts = [loading.read_state(other, name) for name in tables[1]]
    assert list(whole) == ["method.memory.banks.0", "method.memory.banks.1"]
    for name, rows in whole.items():
        assert [len(part[name]) for part in parts] == [60, 60]
        assert torch.equal(torch.cat([part[name] for part in parts]), rows)
    assert not any("banks" in name for name in loading.read_state(one, "shared.pt")["modules"])


def test_a_checkpoint_without_a_part_is_refused(tiny: Path, tmp_path: Path) -> None:
    config = a_run(tiny, tmp_path, "mcl_sharded", train={"epochs": 1})
    run_ranks(2, train_here, config)
    folder = checkpoint.folder_of(tmp_path, 5)
    lost = folder / "tables_00001_of_00002.pt"
    before = lost.read_bytes()
    lost.write_bytes(before[:-1] + bytes([before[-1] ^ 1]))
    with pytest.raises(CheckpointError, match=r"tables_00001_of_00002.pt: altered"):
        loading.verify(folder)
    lost.unlink()
    with pytest.raises(CheckpointError, match=r"tables_00001_of_00002.pt: missing"):
        loading.verify(folder)


# -- a real run -------------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_torchrun_trains_lmcl_on_batches_of_classes_and_scores_it(tmp_path: Path) -> None:
    """The shipped subset, one peer a rank, L-MCL's sampler: pairs of 10 classes."""
    config = small_run(
        Path(),
        tmp_path / "run",
        {"name": "lmcl", "meta_interval": 60, "width": 32},
        data={"dataset": "fashion_mnist_subset", "root": None, "global_batch": 20, "sampler": "class_balanced"},
        train={"max_steps": 120},
        placement={"kind": "spread"},
        log={"every_steps": 10},
    )
    (tmp_path / "run.yaml").write_text(dump(config))
    command = [sys.executable, "-m", "torch.distributed.run", "--nnodes=1", "--nproc-per-node=2"]
    command += ["--rdzv-backend=c10d", "--rdzv-endpoint=127.0.0.1:0", "launch/train.py", str(tmp_path / "run.yaml")]
    done = subprocess.run(
        command, cwd=ROOT, env={**os.environ, "OMP_NUM_THREADS": "1"}, capture_output=True, text=True, timeout=280
    )
    assert done.returncode == 0, done.stderr
    lines = read_metrics(config.folder)
    scores = [line for line in lines if "val/disagreement" in line]
    losses = [line["train/cifar_resnet8_b-0/ce"] for line in lines if "lr" in line]
    assert losses[-1] < 0.9 * losses[0], losses
    for k in range(2):
        # Guessing scores 10 %.
        assert scores[-1][f"val/cifar_resnet8_b-{k}/top1"] > 20
    for name in ("vcl", "soft_vcl", "icl", "soft_icl", "kd", "ce_aggregate"):
        assert all(line[f"train/cifar_resnet8_b-1/{name}"] >= 0 for line in lines if "lr" in line)
    run_command("evaluate", str(config.folder), "placement.kind=auto", "--json", str(tmp_path / "scores.json"))
    evaluated = json.loads((tmp_path / "scores.json").read_text())
    for name, score in scores[-1].items():
        if name.endswith("/best_exit"):  # the last exit is the network's own classifier
            assert score >= scores[-1][name.replace("best_exit", "top1")]
        elif name.startswith("val/"):
            assert evaluated[name] == pytest.approx(score, rel=1e-5), name


# -- mistakes ---------------------------------------------------------------------------------------------------------

PLAIN = {"network": "timm/vit_tiny_patch16_224", "options": {"img_size": 28, "patch_size": 4, "depth": 2}}
REFUSED: dict[str, tuple[dict[str, Any], Any, str]] = {
    "mcl_alone": (
        {"name": "mcl"},
        1,
        "method.name = mcl: mcl needs at least 2 peers to teach each other, found 1",
    ),
    "lmcl_alone": (
        {"name": "lmcl"},
        1,
        "method.name = lmcl: lmcl needs at least 2 peers to teach each other, found 1",
    ),
    "no_stages": (
        {"name": "lmcl"},
        [{"network": "cifar_resnet8_b"}, PLAIN],
        "method.name = lmcl: cannot train timm/vit_tiny_patch16_224 on images of 28 pixels: VisionTransformer has no "
        "stages: no feature maps that shrink from one to the next",
    ),
    "all_stages_shared": (
        {"name": "mcl", "shared_stages": 3},
        2,
        "method.name = mcl: cannot train cifar_resnet8_b on images of 28 pixels: the peers would share 3 stages of 3, "
        "and have none of their own",
    ),
    "trunk_of_unlike_networks": (
        {"name": "mcl", "shared_stages": 1},
        [{"network": "cifar_resnet8_b"}, {"network": "cifar_wrn_16_1"}],
        "peers: mcl shares a trunk between peers of one network; found cifar_resnet8_b, cifar_wrn_16_1",
    ),
    "no_temperature": (
        {"name": "mcl", "tau": 0.0},
        2,
        "method.tau = 0.0: expected a value greater than 0",
    ),
    "misspelt_negatives": (
        {"name": "lmcl", "negatives": "memroy"},
        2,
        "method.negatives = 'memroy': expected one of batch, global, memory; did you mean 'memory'?",
    ),
    "no_interval": (
        {"name": "lmcl", "meta_interval": 0},
        2,
        "method.meta_interval = 0: expected a value greater than or equal to 1",
    ),
}


@pytest.mark.parametrize("mistake", REFUSED)
def test_refused_before_anything_is_started(tiny: Path, tmp_path: Path, mistake: str) -> None:
    method, peers, message = REFUSED[mistake]
    with pytest.raises(ConfigError) as error:
        check_run(small_run(tiny, tmp_path / "run", method, peers), Launch(0, 0, 1))
    assert str(error.value) == message


def refusal(config: RunConfig) -> str:
    with pytest.raises(ConfigError) as error:
        train_here(config)
    return str(error.value)


@pytest.mark.parametrize("ranks", [1, 2])
def test_a_class_with_too_few_images_is_named_on_all_ranks(tiny: Path, tmp_path: Path, ranks: int) -> None:
    """Class 0 has 11 of the 120 images."""
    config = small_run(tiny, tmp_path, {"name": "mcl", **MEMORY, "positives": 30})
    messages = run_ranks(ranks, refusal, config)
    assert (
        messages
        == ["method.name = mcl: class 0 has 11 training samples, positives = 30 needs as many to draw from"] * ranks
    )

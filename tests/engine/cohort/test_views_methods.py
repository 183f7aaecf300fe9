"""KDCL and PCL, whose peers see augmentations of their own: placement, resume, teachers and the bytes of a step."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from engine.config import ConfigError, RunConfig
from engine.reporting.tracking import read_metrics
from engine.safety import checkpoint, loading
from models.stages import plain_state
from tests.engine.ranks.exchanging.test_exchange import FLOAT, ROWS, counted
from tests.engine.stepping import CLASSES, cohort_of, config_of, do_steps
from tests.kills import assert_same_state, final_state, kill_after_step, numbers
from tests.launch.command import run_command
from tests.marks import often
from tests.runs import assert_same_weights, small_run, train_here, weights
from tests.worlds import run_ranks, run_world

LINES: dict[str, Any] = {"log": {"every_steps": 1}, "checkpoint": {"every_steps": 3}, "train": {"epochs": 3}}
KDCL: dict[str, dict[str, Any]] = {
    "minlogit": {"name": "kdcl"},
    "naive": {"name": "kdcl", "ensemble": "naive"},
    "linear": {"name": "kdcl", "ensemble": "linear"},
    "mean": {"name": "kdcl", "ensemble": "mean", "temperature": 4.0, "weight": 0.5, "ce_weight": 0.5},
}
PCL = {"name": "pcl", "ramp_up_epochs": 2}
PER_PEER = {"views": "per_peer"}


def a_run(tiny: Path, folder: Path, method: dict[str, Any], peers: Any = 2, **sections: Any) -> RunConfig:
    return small_run(tiny, folder, method, peers, **{"data": PER_PEER, **sections})


@pytest.fixture(scope="module")
def trained(tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> Any:
    done: dict[Any, dict[str, Tensor]] = {}

    def train(method: str, peers: int, ranks: int, **placement: Any) -> dict[str, Tensor]:
        key = (method, peers, ranks, *placement.items())
        if key not in done:
            folder = tmp_path_factory.mktemp("run")
            run_ranks(ranks, train_here, a_run(tiny, folder, KDCL[method], peers, placement=placement))
            done[key] = weights(folder)
        return done[key]

    return train


@pytest.mark.parametrize("method", often(KDCL, "minlogit"))
def test_kdcl_is_the_same_in_every_placement(trained: Any, method: str) -> None:
    colocated = trained(method, 4, 1, kind="colocated")
    assert_same_weights(trained(method, 4, 4, kind="spread"), colocated)
    assert_same_weights(trained(method, 4, 2, kind="hybrid", peers_per_rank=2), colocated)


def test_kdcl_is_the_same_on_replicas(trained: Any) -> None:
    assert_same_weights(trained("linear", 2, 4, kind="spread"), trained("linear", 2, 2, kind="colocated"))


GENERAL = {"name": "kdcl", "ensemble": "general"}
HELD_OUT = {"views": "per_peer", "held_out": 0.3, "global_batch": 12}


def mixture(folder: Path, step: int) -> Tensor:
    return loading.read_state(checkpoint.folder_of(folder, step), "shared.pt")["modules"]["method.mixture"]


def test_kdcl_general_is_the_same_in_every_placement(tiny: Path, tmp_path: Path) -> None:
    """Of the same peers, and of the weights that it takes from the 36 images held out."""
    placed: list[tuple[int, dict[str, Any]]] = [
        (1, {"kind": "colocated"}),
        (4, {"kind": "spread"}),
        (2, {"kind": "hybrid", "peers_per_rank": 2}),
    ]
    folders = [tmp_path / str(ranks) for ranks, _ in placed]
    for folder, (ranks, placement) in zip(folders, placed, strict=True):
        config = a_run(tiny, folder, GENERAL, 4, placement=placement, data=HELD_OUT, optimizer={"lr": 0.02})
        run_ranks(ranks, train_here, config)
    for folder in folders:
        torch.testing.assert_close(mixture(folder, 7), torch.full((4,), 0.25), rtol=0, atol=0)
        torch.testing.assert_close(mixture(folder, 14), mixture(folders[0], 14), rtol=1e-4, atol=1e-5)
        assert_same_weights(weights(folder), weights(folders[0]))
    assert mixture(folders[0], 14).sum() == pytest.approx(1, abs=1e-5)
    assert mixture(folders[0], 14).std() > 1e-3


def test_kdcl_general_on_replicas_surveys_each_held_out_image_once(tiny: Path, tmp_path: Path) -> None:
    for name, ranks, placement in (("spread", 6, {"kind": "spread"}), ("colocated", 3, {"kind": "colocated"})):
        config = a_run(tiny, tmp_path / name, GENERAL, 2, placement=placement, data=HELD_OUT, evaluation={"batch": 5})
        run_ranks(ranks, train_here, config)
    torch.testing.assert_close(
        mixture(tmp_path / "spread", 14), mixture(tmp_path / "colocated", 14), rtol=1e-4, atol=1e-5
    )


@pytest.mark.slow
def test_a_killed_run_of_kdcl_general_goes_on_as_if_nothing_had_happened(tiny: Path, tmp_path: Path) -> None:
    config = a_run(tiny, tmp_path / "killed", GENERAL, data=HELD_OUT, **LINES)
    kill_after_step(2, config, 10)
    run_ranks(2, train_here, config)
    run_ranks(2, train_here, a_run(tiny, tmp_path / "undisturbed", GENERAL, data=HELD_OUT, **LINES))
    assert_same_state(final_state(tmp_path / "killed"), final_state(tmp_path / "undisturbed"))
    assert numbers(tmp_path / "killed") == numbers(tmp_path / "undisturbed")


def test_kdcl_general_with_nothing_held_out_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"^data.held_out = 0.0: kdcl as configured looks at images that are not"):
        config_of(GENERAL)


# -- PCL --------------------------------------------------------------------------------------------------------------
# On images without a constant background: on Fashion-MNIST's a ReLU that sits near 0 turns over for all of it at once,
# and two runs of one placement that differ by a rounding come 1 % apart within three steps.


def pcl_steps(config: RunConfig, steps: int) -> dict[str, Tensor]:
    """Networks, teachers and shared modules of this rank after so many steps, when the buffers have met."""
    cohort = cohort_of(config)
    do_steps(cohort, range(steps))
    cohort.average_buffers()
    held = {f"{k}/network/{n}": x for k, r in cohort.residents.items() for n, x in plain_state(r.whole).items()}
    for k, r in cohort.residents.items():
        assert r.ema is not None
        held |= {f"{k}/teacher/{n}": x for n, x in plain_state(r.ema.module).items()}
    held |= {f"shared/{n}": x for n, x in cohort.method.state_dict().items()}
    return {name: x.detach().clone() for name, x in held.items()}


def pcl(ranks: int, peers: int, placement: dict[str, Any], views: str = "per_peer", **more: Any) -> dict[str, Tensor]:
    config = config_of(PCL, peers, placement=placement, data={"views": views}, **more)
    return {name: x for rank in run_world(ranks, pcl_steps, config, 10) for name, x in rank.items()}


@pytest.mark.parametrize("views", ["per_peer", "shared"])
def test_pcl_is_the_same_in_every_placement(views: str) -> None:
    colocated = pcl(1, 4, {"kind": "colocated"}, views)
    assert_same_weights(pcl(4, 4, {"kind": "spread"}, views), colocated)
    assert_same_weights(pcl(2, 4, {"kind": "hybrid", "peers_per_rank": 2}, views), colocated)
    parts = {name.split("/")[1] if name[0] != "s" else "shared" for name in colocated}
    assert parts == {"network", "teacher", "shared"}


def test_pcl_is_the_same_on_replicas() -> None:
    assert_same_weights(pcl(4, 2, {"kind": "spread"}), pcl(2, 2, {"kind": "colocated"}))


def test_pcl_is_the_same_with_micro_batches_in_every_placement() -> None:
    micro = {"epochs": 2, "accumulation": 2}
    assert_same_weights(pcl(2, 2, {"kind": "spread"}, train=micro), pcl(1, 2, {"kind": "colocated"}, train=micro))


def test_pcl_shares_the_trunk_and_its_average_and_nothing_else() -> None:
    state = pcl(1, 3, {"kind": "colocated"})
    for part in ("network", "teacher"):
        assert torch.equal(state[f"0/{part}/layer2.0.conv1.weight"], state[f"2/{part}/layer2.0.conv1.weight"])
        assert not torch.equal(state[f"0/{part}/layer3.0.conv1.weight"], state[f"2/{part}/layer3.0.conv1.weight"])
    mean = "teacher/layer2.0.bn1.running_mean"
    assert not torch.equal(state[f"0/{mean}"], state[f"2/{mean}"]), "a teacher's statistics are of its own view"


def weights_of_every_step(config: RunConfig, spoil: int) -> list[dict[str, Tensor]]:
    """Of peer 0 and its teacher: before the first step and after each of 4; step `spoil` meets a NaN."""
    cohort = cohort_of(config)

    def look() -> dict[str, Tensor]:
        resident = cohort.residents[0]
        assert resident.ema is not None
        own, averaged = plain_state(resident.whole), plain_state(resident.ema.module)
        return {n: x.clone() for s, t in (("own", own), ("teacher", averaged)) for n, x in _named(s, t).items()}

    seen = [look()]
    for step in range(4):
        do_steps(cohort, [step], spoil=lambda at, _, images: images.fill_(torch.nan) if at == spoil else None)
        seen.append(look())
    return seen


def _named(prefix: str, state: dict[str, Tensor]) -> dict[str, Tensor]:
    return {f"{prefix}/{name}": x for name, x in state.items()}


def test_teachers_are_the_mean_of_all_weights_so_far_and_keep_statistics_of_their_own() -> None:
    """phi(g) = 1 - 1/(g + 1) up to g = 998, so after update n the teacher is the mean of the n weights up to it."""
    [seen] = run_world(1, weights_of_every_step, config_of(PCL, 2, data=PER_PEER), -1)
    names = [name.removeprefix("own/") for name in seen[0] if name.startswith("own/")]
    for name in names:
        if "running_" in name or "num_batches" in name:
            continue
        for done in range(1, 5):
            mean = torch.stack([seen[i][f"own/{name}"].double() for i in range(1, done + 1)]).mean(0)
            torch.testing.assert_close(seen[done][f"teacher/{name}"].double(), mean, rtol=1e-5, atol=1e-7)
        assert torch.equal(seen[0][f"teacher/{name}"], seen[0][f"own/{name}"]), "it begins as a copy"
        assert torch.equal(seen[1][f"teacher/{name}"], seen[1][f"own/{name}"]), "phi(0) = 0"
    assert seen[4]["teacher/layer3.0.bn1.num_batches_tracked"] == 4
    # The first step runs teacher and student with the same weights; from the second on their statistics part.
    running = "layer3.0.bn2.running_mean"
    torch.testing.assert_close(seen[1][f"teacher/{running}"], seen[1][f"own/{running}"], rtol=1e-5, atol=1e-6)
    assert not torch.allclose(seen[4][f"teacher/{running}"], seen[4][f"own/{running}"], rtol=1e-3)


def test_a_skipped_step_leaves_the_teachers_statistics_as_they_were() -> None:
    [seen] = run_world(1, weights_of_every_step, config_of(PCL, 2, data=PER_PEER), 1)
    for name, x in seen[1].items():
        if "running_" in name or "num_batches" in name:
            assert torch.equal(x, seen[2][name]), name
    assert all(x.isfinite().all() for x in seen[4].values())


# -- one exchange a step ----------------------------------------------------------------------------------------------


def test_pcl_sends_features_and_the_teachers_logits_and_not_its_own() -> None:
    width = 16  # of the pooled features of a ResNet of width 4
    for calls, _ in counted(2, {"kind": "spread"}, PCL, data=PER_PEER):
        sent = [call for call in calls if call.part == "exchange"]
        assert [(call.collective, call.size) for call in sent] == [("allgather_base", FLOAT * ROWS * (width + CLASSES))]


def test_kdcl_sends_logits() -> None:
    for calls, _ in counted(2, {"kind": "spread"}, {"name": "kdcl"}, data=PER_PEER):
        sent = [call for call in calls if call.part == "exchange"]
        assert [(call.collective, call.size) for call in sent] == [("allgather_base", FLOAT * ROWS * CLASSES)]


# -- whole runs -------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def undisturbed(tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("undisturbed")
    run_ranks(2, train_here, a_run(tiny, folder, PCL, **LINES))
    return folder


def test_a_killed_run_of_pcl_goes_on_as_if_nothing_had_happened(tiny: Path, tmp_path: Path, undisturbed: Path) -> None:
    config = a_run(tiny, tmp_path, PCL, **LINES)
    kill_after_step(2, config, 7)
    run_ranks(2, train_here, config)
    assert_same_state(final_state(tmp_path), final_state(undisturbed))
    assert numbers(tmp_path) == numbers(undisturbed)
    assert any("/ema/" in key for key in final_state(tmp_path))


def test_teachers_are_scored_and_exported_as_averages(undisturbed: Path, tmp_path: Path) -> None:
    last = read_metrics(undisturbed)[-1]
    assert {"ema/cifar_resnet8_b-0/top1", "ema/ensemble/top1", "val/cifar_resnet8_b-1/top1"} <= last.keys()
    run_command("export", str(undisturbed), "--ema", "--peer", "cifar_resnet8_b-0", "--out", str(tmp_path))
    card = json.loads((tmp_path / "cifar_resnet8_b-0-ema.json").read_text())
    assert card["trained"]["moving_average"] is True
    assert card["trained"]["top1"] == last["ema/cifar_resnet8_b-0/top1"]
    run_command("evaluate", str(undisturbed), "--json", str(tmp_path / "scores.json"))
    scores = json.loads((tmp_path / "scores.json").read_text())
    assert scores["ema/ensemble/top1"] == pytest.approx(last["ema/ensemble/top1"], rel=1e-5)


def test_an_average_beside_the_teachers_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"train.ema_decay = 0.9: pcl keeps moving averages of its own"):
        config_of(PCL, 2, train={"epochs": 1, "ema_decay": 0.9})

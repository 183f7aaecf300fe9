"""A peer that is trained already: it teaches, learns nothing, and is saved as a reference."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import Tensor

import models
from engine.config import ConfigError
from engine.config.loading import validate
from engine.preflight import check_run
from engine.ranks.collectives import Launch
from engine.ranks.planning.choosing import plan
from engine.rehearsal import Images, rehearse
from losses import METHODS, PeerInfo, Progress
from tests.engine.stepping import cohort_of, config_of, do_steps, global_batch, state
from tests.launch.command import run_command
from tests.marks import often
from tests.runs import assert_same_weights, small_run, train_here, weights
from tests.worlds import run_ranks, run_world

SMALL: dict[str, Any] = {"network": "cifar_resnet8_b", "options": {"width": 4}}
WIDE: dict[str, Any] = {"network": "cifar_resnet8_b", "options": {"width": 8}}


@pytest.fixture(scope="module")
def teacher(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """A frozen peer; its weights are random, and its BatchNorm statistics other than those it begins with."""
    torch.manual_seed(3)
    network = models.create("cifar_resnet8_b", 10, 1, width=8)
    for _ in range(20):
        network(torch.rand(64, 1, 28, 28))
    path = tmp_path_factory.mktemp("teacher") / "teacher.safetensors"
    save_file(network.state_dict(), path)
    return {**WIDE, "name": "teacher", "pretrained": str(path), "frozen": True}


@pytest.fixture(scope="module")
def other(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """Another teacher."""
    torch.manual_seed(4)
    path = tmp_path_factory.mktemp("other") / "other.pt"
    torch.save(models.create("cifar_resnet8_b", 10, 1, width=4).state_dict(), path)
    return {**SMALL, "name": "other", "pretrained": str(path), "frozen": True}


STUDENT = {**SMALL, "name": "student"}


def test_dml_from_a_frozen_peer_is_kd() -> None:
    """T = 2, teacher (2, 0), student (0, 0), class 0: q = softmax(1, 0), p = (1/2, 1/2), so L = ln 2 + 4 KL(q || p)."""
    options = METHODS["dml"].Options(name="dml", temperature=2.0)  # type: ignore[call-arg]
    infos = [PeerInfo(k, 2, 0, (), *3 * (lambda *_: torch.nn.Identity(),)) for k in range(2)]
    method = METHODS["dml"](options, infos)
    signals = [{"logits": torch.tensor([[2.0, 0.0]])}, {"logits": torch.zeros(1, 2, requires_grad=True)}]
    terms = method([1], signals, torch.tensor([0]), Progress(0, 1, 1))
    q = math.e / (1 + math.e)
    kl = q * math.log(2 * q) + (1 - q) * math.log(2 * (1 - q))
    assert {key: x.item() for key, x in terms.items()} == pytest.approx(
        {(1, "ce"): math.log(2), (1, "kl"): 4 * kl}, rel=1e-6
    )


def distil(config: Any) -> dict[str, Tensor]:
    cohort = cohort_of(config)
    do_steps(cohort, range(3))
    return state(cohort)


def test_three_steps_are_those_of_a_bare_loop_of_distillation(teacher: dict[str, Any]) -> None:
    """The teacher in evaluation, the student in training, CE + T^2 KL(teacher || student), SGD."""
    method = {"name": "dml", "temperature": 3.0, "weight": 0.7}
    config = config_of(method, [teacher, STUDENT])
    (found,) = run_world(1, distil, config)
    (start,) = run_world(1, started, config)
    student, trained = (
        models.create("cifar_resnet8_b", 10, 1, width=4),
        models.create("cifar_resnet8_b", 10, 1, width=8),
    )
    student.load_state_dict({name.removeprefix("1/network."): x for name, x in start.items() if name[0] == "1"})
    trained.load_state_dict({name.removeprefix("0/network."): x for name, x in start.items() if name[0] == "0"})
    before = {name: x.clone() for name, x in trained.state_dict().items()}
    optimizer = torch.optim.SGD(student.parameters(), 0.05, momentum=0.9, weight_decay=5e-4, nesterov=True)
    trained.eval()
    for step in range(3):
        batch = global_batch(config, step)
        z = student(batch.images)
        with torch.no_grad():
            t = trained(batch.images)
        kl = F.kl_div((z / 3).log_softmax(-1), (t / 3).log_softmax(-1), reduction="batchmean", log_target=True)
        optimizer.zero_grad()
        (F.cross_entropy(z, batch.targets) + 0.7 * 9 * kl).backward()
        optimizer.step()
    expected = {f"1/network.{name}": x for name, x in student.state_dict().items()}
    assert_same_weights({k: v for k, v in found.items() if k in expected}, expected)
    assert all(torch.equal(found[f"0/network.{name}"], x) for name, x in before.items())


def started(config: Any) -> dict[str, Tensor]:
    return state(cohort_of(config))


CASES: dict[str, tuple[dict[str, Any], list[str]]] = {
    "kd": ({"name": "dml", "temperature": 3.0}, ["teacher", "student"]),
    "kd_in_turns": ({"name": "dml", "order": "sequential"}, ["student", "teacher"]),
    "two_teachers": ({"name": "dml"}, ["teacher", "student", "other"]),
    "kdcl": ({"name": "kdcl"}, ["student", "teacher"]),
}


def a_run(tiny: Path, folder: Path, case: str, peers: dict[str, Any], **sections: Any) -> Any:
    method, names = CASES[case]
    sections = {"train": {"epochs": 2, "ema_decay": 0.9}, "schedule": {"name": "constant"}, **sections}
    return small_run(tiny, folder, method, [peers[name] for name in names], **sections)


@pytest.fixture(scope="module")
def peers(teacher: dict[str, Any], other: dict[str, Any]) -> dict[str, Any]:
    return {"teacher": teacher, "other": other, "student": STUDENT}


@pytest.mark.parametrize("case", often(CASES, "kd_in_turns", "two_teachers"))
def test_placement_does_not_change_the_numbers(tiny: Path, tmp_path: Path, peers: dict[str, Any], case: str) -> None:
    found = []
    for name, ranks, kind in (("one", 1, "colocated"), ("spread", len(CASES[case][1]), "spread")):
        run_ranks(ranks, train_here, a_run(tiny, tmp_path / name, case, peers, placement={"kind": kind}))
        found.append(weights(tmp_path / name))
    assert {name.partition("/")[0] for name in found[0]} == {"student"}
    assert_same_weights(found[1], found[0])


def test_replicas_of_a_teacher_change_nothing(tiny: Path, tmp_path: Path, peers: dict[str, Any]) -> None:
    """Two replicas on either side, so that the student's BatchNorm sees the same rows."""
    for name, ranks, kind in (("two", 2, "colocated"), ("four", 4, "spread")):
        run_ranks(ranks, train_here, a_run(tiny, tmp_path / name, "kd", peers, placement={"kind": kind}))
    assert_same_weights(weights(tmp_path / "four"), weights(tmp_path / "two"))


def test_it_goes_on_is_scored_and_the_student_alone_exported(tiny: Path, tmp_path: Path, peers: dict[str, Any]) -> None:
    """From spread to spread bit by bit, and what a checkpoint holds of a teacher is a reference."""
    whole, halves = tmp_path / "whole", tmp_path / "halves"
    run_ranks(2, train_here, a_run(tiny, whole, "kd", peers))
    run_ranks(2, train_here, a_run(tiny, halves, "kd", peers, train={"epochs": 1, "ema_decay": 0.9}))
    file = halves / "checkpoints" / "step_00000005" / "peer_teacher.pt"
    assert file.stat().st_size < 3000
    assert torch.load(file, weights_only=True)["reference"]["source"] == peers["teacher"]["pretrained"]
    run_ranks(2, train_here, a_run(tiny, halves, "kd", peers))
    assert_same_weights(weights(halves), weights(whole), 0)

    moved = whole.rename(tmp_path / "moved")
    assert "teacher" in run_command("evaluate", str(moved))[1]
    run_command("export", str(moved))
    assert sorted(path.name for path in (moved / "export").iterdir()) == ["student.json", "student.safetensors"]
    said = run_command("report", str(moved), "--out", str(tmp_path / "table"))[1]
    assert "teacher (frozen)" in said
    assert "deployed: the mean of the peers" in said


def test_weights_that_are_gone_or_others_are_named(tiny: Path, tmp_path: Path, teacher: dict[str, Any]) -> None:
    path = tmp_path / "mine.safetensors"
    path.write_bytes(Path(teacher["pretrained"]).read_bytes())
    peers = [{**teacher, "pretrained": str(path)}, STUDENT]
    run = tmp_path / "run"
    run_ranks(1, train_here, small_run(tiny, run, {"name": "dml"}, peers, train={"epochs": 1}))
    longer = small_run(tiny, run, {"name": "dml"}, peers)
    state = models.create("cifar_resnet8_b", 10, 1, width=8).state_dict()
    save_file(state, path)
    with pytest.raises(RuntimeError, match=r"mine\.safetensors: not the weights that the run was started with"):
        run_ranks(1, train_here, longer)
    path.unlink()
    with pytest.raises(
        ConfigError, match=r"^peers\.0: .*there is no such file; a run keeps no copy of a frozen peer's"
    ):
        check_run(longer, Launch(0, 0, 1))


def scales(config: Any) -> tuple[float, float, dict[str, Tensor]]:
    cohort = cohort_of(config)
    do_steps(cohort, range(2))
    after = cohort.scaler.get_scale()
    return after, cohort.optimizers()[0].param_groups[0]["lr"], state(cohort)


def test_a_rank_of_teachers_alone_keeps_step_with_fp16(teacher: dict[str, Any]) -> None:
    """The loss scale that rank 0 saves is that of the run, and so is the rate that it reports."""
    config = config_of(
        {"name": "dml"},
        [teacher, STUDENT],
        placement={"kind": "spread"},
        precision={"amp": "fp16"},
        optimizer={"lr": 1e-3},
    )
    (first, rate, held), (second, other_rate, _) = run_world(2, scales, config)
    assert first == second == 65536
    assert rate == other_rate == 1e-3
    assert all(name.startswith("0/") for name in held)


def test_memory_of_a_teacher_is_its_weights(teacher: dict[str, Any]) -> None:
    config = config_of({"name": "dml"}, [teacher, STUDENT], placement={"kind": "spread"})
    memory = rehearse(config, plan(config, 2, 0), Images(10, 1, 16, 100)).memory
    assert memory.gradients == 0
    assert memory.optimizer <= 8  # what stands in for one
    weights = sum(
        x.numel() * x.element_size() for x in models.create("cifar_resnet8_b", 10, 1, width=8).state_dict().values()
    )
    assert memory.weights == pytest.approx(weights, rel=0.001)


UNFIT = {
    "independent": "its peers do not see each other's signals",
    "dcl": "its peers do not see each other's signals",
    "codistillation": "its peers do not see each other's signals",
    "dcm": "its peers teach by heads that the method attaches, and those of a frozen one would stay at random",
    "mcl": "its peers teach by heads that the method attaches, and those of a frozen one would stay at random",
    "lmcl": "its peers teach by heads that the method attaches, and those of a frozen one would stay at random",
    **dict.fromkeys(("cl_ilr", "one", "ffl", "okddip", "pcl"), "its peers are branches of one network"),
}


def test_every_method_takes_a_frozen_peer_or_says_why_not(teacher: dict[str, Any]) -> None:
    assert {*UNFIT, "dml", "kdcl"} == {*METHODS}
    cases = [({"name": name}, reason) for name, reason in UNFIT.items()]
    cases.append(({"name": "okddip", "form": "network"}, "its attention is learned by all peers' terms together"))
    for method, reason in cases:
        with pytest.raises(ConfigError) as refused:
            config_of(method, [teacher, STUDENT])
        assert str(refused.value) == (
            f"peers.0.frozen = True: {method['name']} has no use for a network that is trained already: {reason}; "
            "expected method.name = dml or kdcl, or parts of the network, such as [layer1]"
        )


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"pretrained": False},
            "peers.0.frozen = True: a peer that learns nothing would stay at random; expected peers.0.pretrained, true "
            "or the path of a file of weights",
        ),
        ({"copies": 2, "name": None}, "peers.0.copies = 2: a frozen peer's copies are all the same; expected 1"),
        ({"optimizer": {"lr": 0.1}}, "peers.0.optimizer: a frozen peer has none; expected no values"),
    ],
)
def test_what_a_frozen_peer_cannot_have(teacher: dict[str, Any], changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError) as refused:
        config_of({"name": "dml"}, [{**teacher, **changes}, STUDENT])
    assert str(refused.value) == message


def test_somebody_has_to_learn(teacher: dict[str, Any], other: dict[str, Any]) -> None:
    with pytest.raises(
        ConfigError, match=r"^peers: all of them are frozen, so nobody learns; expected one that is not$"
    ):
        config_of({"name": "dml"}, [teacher, other])


def test_a_classifier_of_other_classes_is_refused(tiny: Path, tmp_path: Path) -> None:
    path = tmp_path / "thousand.pt"
    torch.save(models.create("cifar_resnet8_b", 1000, 1, width=4).state_dict(), path)
    peers = [{**SMALL, "name": "teacher", "pretrained": str(path), "frozen": True}, STUDENT]
    config = validate(small_run(tiny, tmp_path / "run", {"name": "dml"}, peers).model_dump())
    with pytest.raises(ConfigError, match=r"would leave .*fc.* at random; expected weights of the whole network"):
        check_run(config, Launch(0, 0, 1))

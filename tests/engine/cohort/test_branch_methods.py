"""Methods whose peers are branches of one network (CL-ILR, ONE, FFL, OKDDip): promise 1, what travels, what they are
made of. OKDDip's form of whole networks is here too."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

import models
from data_pipelines import Batch
from engine.cohort.cohort import Cohort
from engine.config import ConfigError, RunConfig
from engine.config.loading import validate
from engine.ranks.planning.choosing import plan
from engine.rehearsal import META
from losses import Progress
from models.shapes_alone import dry_run
from models.stages import plain_state
from tests.engine.ranks.exchanging.test_exchange import FLOAT, ROWS, Call, agreement, calls_of_a_step
from tests.engine.stepping import CLASSES, CPU, cohort_in_double, cohort_of, config_of, do_steps
from tests.marks import often, slow
from tests.runs import assert_same_weights, small_run, train_here, weights
from tests.worlds import run_ranks, run_world

FORMS: dict[str, dict[str, Any]] = {
    "cl_ilr": {"name": "cl_ilr"},
    "cl_ilr_okddip": {
        "name": "cl_ilr",
        "beta": None,
        "temperature": 3.0,
        "times_t_squared": True,
        "ramp_up_epochs": 2,
        "teacher": "attached",
    },
    "one": {"name": "one", "ramp_up_epochs": 2},
    "ffl": {"name": "ffl", "ramp_up_epochs": 2},
    "okddip_branch": {"name": "okddip", "ramp_up_epochs": 2},
    "okddip_network": {"name": "okddip", "form": "network", "ramp_up_epochs": 2},
    "okddip_probabilities": {"name": "okddip", "mix": "probabilities", "ramp_up_epochs": 2},
}
PEERS = [{"network": "cifar_resnet8_b", "copies": 4, "options": {"width": 4}}]
HYBRID = {"kind": "hybrid", "peers_per_rank": 2}


def run(config: RunConfig, steps: int, double: bool = False) -> dict[str, torch.Tensor]:
    """Every tensor of this rank's networks and of all that is shared, after the buffers have met.

    Args:
        double: compute, and exchange, in float64 throughout. This rank does so until the end of its world.
    """
    cohort = cohort_in_double(config) if double else cohort_of(config)
    do_steps(cohort, range(steps))
    cohort.average_buffers()
    tensors = {f"{k}/{name}": x for k, r in cohort.residents.items() for name, x in plain_state(r.whole).items()}
    tensors |= {f"shared/{name}": x for name, x in cohort.shared.state_dict().items()}
    assert not double or all(x.dtype != torch.float32 for x in tensors.values())
    return {name: x.clone() for name, x in tensors.items()}


DONE: dict[Any, dict[str, torch.Tensor]] = {}


def trained(form: str, ranks: int, steps: int, double: bool = False, **placement: Any) -> dict[str, torch.Tensor]:
    """All ranks' tensors as one; what all ranks hold must be the same bits."""
    key = (form, ranks, steps, double, repr(placement))
    if key not in DONE:
        config = config_of(FORMS[form], PEERS, placement=placement).model_copy(update={"seed": 3})
        states = run_world(ranks, run, config, steps, double)
        for name, x in states[0].items():
            if name.startswith("shared/"):
                assert all(torch.equal(other[name], x) for other in states[1:]), f"{name} differs between ranks"
        DONE[key] = {name: x for state in states for name, x in state.items()}
    return DONE[key]


# A trunk's gradient is a sum over ranks, so that rounding depends on the placement. Biases of these tiny networks start
# at 0, and a unit that is about to turn over makes of 1e-6 a percent within ten steps of float32: after three it is
# below 1e-5 of every tensor, and ten are compared in float64.
STEPS = pytest.mark.parametrize(("steps", "double", "within"), [slow(3, False, 1e-5), (10, True, 1e-12)])


@STEPS
@pytest.mark.parametrize("form", often(FORMS, "cl_ilr", "one", "ffl", "okddip_branch", "okddip_network"))
def test_spread_and_hybrid_equal_colocated(form: str, steps: int, double: bool, within: float) -> None:
    colocated = trained(form, 1, steps, double, kind="colocated")
    assert_same_weights(trained(form, 4, steps, double, kind="spread"), colocated, within)
    assert_same_weights(trained(form, 2, steps, double, **HYBRID), colocated, within)


@STEPS
@pytest.mark.parametrize("form", often(FORMS, "one", "ffl", "okddip_network"))
def test_replicas_of_a_hybrid_equal_as_many_of_everything(form: str, steps: int, double: bool, within: float) -> None:
    """BatchNorm of a gate or a fusion too sees half of the rows on either side; its statistics are the mean of both."""
    colocated = trained(form, 2, steps, double, kind="colocated")
    assert_same_weights(trained(form, 4, steps, double, **HYBRID), colocated, within)


def test_forms_differ() -> None:
    """The equalities above would hold for methods that do nothing, too."""
    runs = [trained(form, 1, 3, kind="colocated") for form in FORMS]
    for i, one in enumerate(runs):
        for other in runs[:i]:
            shared = {name for name in one.keys() & other.keys() if name.startswith("0/")}
            with pytest.raises(AssertionError):
                assert_same_weights({n: one[n] for n in shared}, {n: other[n] for n in shared}, 1e-3)


@pytest.mark.parametrize("form", ["one", "ffl", "okddip_branch"])
def test_shared_modules_learn(form: str) -> None:
    before, after = trained(form, 1, 0, kind="colocated"), trained(form, 1, 3, kind="colocated")
    learnt = [name for name in before if name.startswith("shared/method.") and before[name].is_floating_point()]
    assert learnt
    for name in learnt:
        assert not torch.equal(before[name], after[name]), name


@pytest.mark.parametrize("method", ["cl_ilr", slow("one"), "ffl", slow("okddip")])
def test_a_whole_run_on_real_images(tiny: Path, tmp_path: Path, method: str) -> None:
    """Ten steps with evaluations and checkpoints, one of three branches a rank."""
    run_ranks(3, train_here, small_run(tiny, tmp_path, {"name": method}, 3, placement={"kind": "spread"}))
    saved = weights(tmp_path)
    for name, x in saved.items():
        peer, _, key = name.partition("/")
        assert x.isfinite().all(), name
        shared = key.startswith(("conv1.", "bn1.", "layer1.", "layer2."))
        first = saved[f"cifar_resnet8_b-0/{key}"]
        assert torch.equal(x, first) == (shared or peer.endswith("-0") or "num_batches" in key), name


# -- what travels -----------------------------------------------------------------------------------------------------

LOGITS, FEATURES, MAP = CLASSES, 16, 16 * 4 * 4
SENT = {
    "cl_ilr": LOGITS,
    "cl_ilr_okddip": LOGITS,
    "one": LOGITS,
    "ffl": LOGITS + MAP,
    "okddip_branch": LOGITS + FEATURES,
    "okddip_network": LOGITS + FEATURES,
}


def counted(config: RunConfig) -> tuple[list[Call], int]:
    """The collectives of a step, and the bytes of the gradients of all that is shared."""
    calls, _ = calls_of_a_step(config)
    shared = sum(p.numel() for p in cohort_of(config).shared.parameters())
    return calls, shared * FLOAT


@pytest.mark.parametrize("form", SENT)
def test_one_exchange_a_step_and_the_gradients_of_what_is_shared(form: str) -> None:
    config = config_of(FORMS[form], PEERS, placement={"kind": "spread"})
    everyone = (0, 1, 2, 3)
    for calls, shared in run_world(4, counted, config):
        exchanged = [call for call in calls if call.part == "exchange"]
        assert exchanged == [Call("exchange", "allgather_base", everyone, FLOAT * ROWS * SENT[form])]
        averaged = [call for call in calls if call.part == "backward"]
        assert sum(call.size for call in averaged) == shared
        assert all(call.collective == "allreduce" and call.ranks == everyone for call in averaged)
        assert [call for call in calls if call.part not in ("exchange", "backward")] == [agreement(4)]


# Section 7 of the specification, in bytes: logits 512,000, features 1,048,576, the last map 51,380,224. What is shared:
# the trunk up to layer3, 8,543,296 parameters, with the gate, the fusion or W_q and W_k.
TRUNK = 8_543_296
IMAGENET: list[tuple[dict[str, Any], int, int, int]] = [
    ({"name": "cl_ilr"}, 2, 512_000, TRUNK),
    ({"name": "one"}, 3, 512_000, TRUNK + 1024 * 3 + 3 + 2 * 3),
    ({"name": "ffl"}, 2, 51_892_224, TRUNK + 10_486_760),
    ({"name": "okddip"}, 3, 1_560_576, TRUNK + 2 * 2048 * 256),
    ({"name": "okddip", "form": "network"}, 3, 1_560_576, 2 * 2048 * 256),
]


def resnet50() -> list[tuple[int, int]]:
    """Of each: bytes that a peer shows at 128 ImageNet images, found from one, and parameters of all that is shared."""
    found = []
    for method, peers, *_ in IMAGENET:
        config = validate(
            {
                "name": "imagenet",
                "device": "cpu",
                "method": method,
                "peers": [{"network": "torchvision/resnet50", "copies": peers}],
                "data": {"dataset": "image_folder", "root": "nowhere", "global_batch": 128},
                "train": {"epochs": 1},
            }
        )
        cohort = Cohort(
            config, plan(config, 1, 0), META, num_classes=1000, channels=3, image_size=224, steps_per_epoch=1
        )
        images, targets = torch.zeros(1, 3, 224, 224, device=META), torch.zeros(1, dtype=torch.int64, device=META)
        batch = Batch((images,), targets, torch.zeros(1, device=META))
        shown = dry_run(cohort.forward, batch, Progress(0, 1, 1), 0, range(1))[0]
        shared = sum(p.numel() for p in cohort.shared.parameters())
        found.append((128 * FLOAT * sum(x.numel() for name, x in shown.items() if name not in cohort.private), shared))
    return found


def test_bytes_at_the_shapes_of_resnet_50_are_the_specifications() -> None:
    assert run_world(1, resnet50)[0] == [(shown, shared) for _, _, shown, shared in IMAGENET]


# -- what they are made of --------------------------------------------------------------------------------------------

RESNET_32, RESNET_110, RESNET_164 = "cifar_resnet32_b", "cifar_resnet110_bottleneck", "cifar_resnet164_bottleneck"
WRN = "cifar_wrn_20_8_bottleneck"
PUBLISHED: list[tuple[str, str, int, int]] = [
    ("one", RESNET_32, 3, 1_193_189),
    ("one", RESNET_164, 3, 4_363_653),
    ("one", RESNET_32, 4, 1_553_388),
    ("one", RESNET_110, 4, 3_858_156),
    ("cl_ilr", RESNET_32, 4, 1_553_248),
    ("cl_ilr", RESNET_110, 4, 3_857_632),
    ("okddip", RESNET_32, 4, 1_554_272),
    ("okddip", RESNET_110, 4, 3_874_016),
    ("okddip", WRN, 4, 22_611_936),
    ("ffl", RESNET_32, 2, 832_920 + 16_228),
    ("ffl", "cifar_resnet110_b", 2, 3_058_520 + 16_228),
]


def parameters() -> list[tuple[int, int]]:
    """(of everything that learns, of the cut networks put together again) for each."""
    found = []
    for method, network, peers, _ in PUBLISHED:
        config = config_of({"name": method}, [{"network": network, "copies": peers}])
        cohort = Cohort(config, plan(config, 1, 0), CPU, num_classes=100, channels=3, image_size=32, steps_per_epoch=1)
        modules = [cohort.shared, *(r.peer for r in cohort.residents.values())]
        whole = models.create(network, 100, 3)
        found.append((sum(models.parameter_count(m) for m in modules), models.parameter_count(whole)))
        assert models.parameter_count(cohort.residents[0].whole) == models.parameter_count(whole)
    return found


def test_parameters_are_those_of_the_published_codes() -> None:
    found = run_world(1, parameters)[0]
    assert [learning for learning, _ in found] == [expected for *_, expected in PUBLISHED]


# -- what is refused --------------------------------------------------------------------------------------------------


def test_a_gate_needs_one_view() -> None:
    with pytest.raises(
        ConfigError, match=r"^data.views = per_peer: one needs one augmentation for all peers; expected shared$"
    ):
        config_of({"name": "one"}, 2, data={"views": "per_peer"})


@pytest.mark.parametrize("method", ["cl_ilr", "one", "ffl", "okddip"])
def test_branches_of_unlike_networks_are_refused(method: str) -> None:
    unlike = [{"network": "cifar_resnet8_b", "copies": 2}, {"network": "cifar_resnet14_b"}]
    with pytest.raises(ConfigError, match=f"{method} shares a trunk between peers of one network; found cifar_resnet"):
        config_of({"name": method}, unlike)


def test_okddips_leader_may_be_another_network_in_the_form_without_a_trunk() -> None:
    unlike = [{"network": "cifar_resnet8_b", "copies": 2, "options": {"width": 4}}, {"network": "cifar_wrn_10_1"}]
    config = config_of({"name": "okddip", "form": "network"}, unlike, placement={"kind": "spread"})
    states = run_world(3, run, config, 1)
    assert states[0]["shared/method.query.weight"].shape == (2, 16)

"""Methods that exchange parameters instead of signals, and one that exchanges less than its signals: what they write
and send, step by step, on real ranks."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
from torch import Tensor

import models
from engine.cohort.cohort import Cohort
from engine.config import ConfigError, RunConfig
from engine.preflight import check_run
from engine.ranks.collectives import Launch, group_of
from engine.ranks.exchanging.exchange import Exchange
from engine.ranks.placement import Placement
from engine.safety import checkpoint, loading
from engine.training.step import train_step
from losses import METHODS, PeerInfo, Progress
from losses.capabilities import AfterStep
from tests.engine.ranks.exchanging.test_exchange import BF16, FLOAT, ROWS, Call, Parts, Recorder, agreement
from tests.engine.stepping import (
    CLASSES,
    STEPS_PER_EPOCH,
    batches,
    cohort_of,
    config_of,
    do_steps,
    joined,
    optimizer_state,
    state,
)
from tests.kills import assert_same_state, final_state, numbers
from tests.launch.command import run_command
from tests.marks import slow
from tests.runs import small_run, train_here, weights
from tests.worlds import run_ranks, run_world

DCL: dict[str, Any] = {"name": "dcl", "interval": 3, "beta": 0.25}
STALE: dict[str, Any] = {"name": "codistillation", "burn_in": 3, "interval": 4}
UNLIKE: list[dict[str, Any]] = [
    {"network": "cifar_resnet8_b", "options": {"width": 4}},
    {"network": "cifar_wrn_16_1"},
]


def states_after(config: RunConfig, steps: list[int], spoilt: int | None = None) -> Any:
    """This rank's state, and what its optimisers remember, before the first step and after each."""

    def spoil(step: int, rank: int, images: Tensor) -> None:
        if step == spoilt and rank == 0:
            images[0] = torch.nan

    cohort = cohort_of(config)
    seen = [(state(cohort), optimizer_state(cohort), 0)]
    for step in steps:
        [(_, skipped)] = do_steps(cohort, [step], spoil=spoil)
        seen.append((state(cohort), optimizer_state(cohort), skipped))
    return seen


def is_parameter(name: str) -> bool:
    return "running_" not in name and "num_batches" not in name


# -- mixing -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("options", [{}, {"combine": "mean"}, {"epsilon": "published"}], ids=str)
def test_dcl_mixes_what_the_optimiser_has_just_written(options: dict[str, str]) -> None:
    """Three equal steps of independent peers, and the mixture by hand in float64."""
    [alone] = run_world(1, states_after, config_of({"name": "independent"}, 3), [0, 1, 2])
    [mixed] = run_world(1, states_after, config_of(DCL | options, 3), [0, 1, 2])
    for step in (1, 2):
        assert_equal(mixed[step][0], alone[step][0])
    assert_equal(mixed[3][1], alone[3][1])
    for name, found in mixed[3][0].items():
        if not is_parameter(name):
            assert torch.equal(found, alone[3][0][name]), name
            continue
        k, key = int(name[0]), name[2:]
        w = np.stack([alone[3][0][f"{j}/{key}"].double().numpy() for j in range(3)])
        if options.get("combine") == "mean":
            bar = w.mean(0)
        else:
            m = np.stack([np.abs(np.prod(np.delete(w, j, 0), 0)) for j in range(3)])
            total = m.sum(0) + (1e-18 if "epsilon" in options else 0)
            bar = np.divide((m * w).sum(0), total, out=np.zeros_like(total), where=total > 0)
        np.testing.assert_allclose(found, 0.25 * bar + 0.75 * w[k], rtol=1e-5, atol=1e-7, err_msg=name)


def assert_equal(one: dict[str, Tensor], other: dict[str, Tensor]) -> None:
    assert one.keys() == other.keys()
    assert all(torch.equal(x, other[name]) for name, x in one.items())


@pytest.mark.parametrize("method", [DCL, DCL | {"combine": "mean"}], ids=["abs", "mean"])
@pytest.mark.parametrize("ranks", [1, 2])
def test_dcl_writes_nothing_in_a_skipped_step(ranks: int, method: dict[str, Any]) -> None:
    config = config_of(method, placement={"kind": "spread" if ranks == 2 else "colocated"})
    for seen in run_world(ranks, states_after, config, [0, 1, 2, 3], 2):
        assert [skipped for _, _, skipped in seen] == [0, 0, 0, 1, 0]
        assert_equal(seen[3][0], seen[2][0])
        assert all(x.isfinite().all() for x in seen[4][0].values())


# -- stale copies -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("wire", ["float32", "bf16"])
@pytest.mark.parametrize(("ranks", "kind"), [(1, "colocated"), slow(2, "spread"), (4, "spread")])
def test_copies_are_the_peers_of_the_step_that_exchanged_them(ranks: int, kind: str, wire: str) -> None:
    """Taken after steps 3 and 7 (numbers 2 and 6), and untouched in between; equal on all ranks."""
    config = config_of(STALE | {"wire": wire}, UNLIKE, placement={"kind": kind})
    seen = run_world(ranks, states_after, config, list(range(8)))
    for taken, until in ((3, 6), (7, 8)):
        peers = joined([rank[taken][0] for rank in seen])
        for rank in seen:
            for k in range(2):
                for name, x in rank[until][0].items():
                    if name.startswith(f"method/copies.{k}.") and x.is_floating_point():
                        y = peers[f"{k}/network.{name.removeprefix(f'method/copies.{k}.')}"]
                        assert torch.equal(x, y if wire == "float32" else y.bfloat16().float()), name
                        assert torch.equal(x, seen[0][until][0][name]), name
    assert any(not torch.equal(x, seen[0][8][0][n]) for n, x in seen[0][6][0].items() if n.startswith("method/"))


def test_copies_of_a_skipped_step_are_those_of_the_step_before() -> None:
    for rank, seen in enumerate(
        run_world(2, states_after, config_of(STALE, placement={"kind": "spread"}), [0, 1, 2], 2)
    ):
        assert seen[3][2] == 1
        assert_equal(
            {n: x for n, x in seen[3][0].items() if n.startswith(f"{rank}/")},
            {n: x for n, x in seen[2][0].items() if n.startswith(f"{rank}/")},
        )
        copied = "conv1.weight"
        assert torch.equal(seen[3][0][f"method/copies.{rank}.{copied}"], seen[2][0][f"{rank}/network.{copied}"])
        assert all(x.isfinite().all() for x in seen[3][0].values())


# -- calls and bytes --------------------------------------------------------------------------------------------------


def calls_by_step(config: RunConfig, warm: int, steps: int) -> tuple[list[list[Call]], int, int]:
    """The collectives of each of `steps` steps after `warm` ones, in which ranks tell each other shapes; and how many
    parameters and statistics a peer of this rank has."""
    cohort = cohort_of(config)
    do_steps(cohort, range(warm))
    calls = []
    for step, pieces in batches(cohort, range(warm, warm + steps)):
        with Recorder() as recorder:
            train_step(cohort, pieces, Progress(step, STEPS_PER_EPOCH, 4), Parts(recorder))
        calls.append(recorder.calls)
    network = next(iter(cohort.residents.values())).peer.network
    floats = [b for b in network.buffers() if b.is_floating_point()]
    return calls, sum(p.numel() for p in network.parameters()), sum(b.numel() for b in floats)


def test_dcl_is_one_collective_every_interval_counted_within_the_epoch() -> None:
    """Epochs of 5 steps and an interval of 3: each epoch's step 2 alone, and 4 bytes a parameter there."""
    config = config_of(DCL, placement={"kind": "spread"}, train={"epochs": 4})
    for calls, parameters, _ in run_world(2, calls_by_step, config, 5, 10):
        mixing = Call("optimizer", "allgather_base", (0, 1), FLOAT * parameters)
        expected = [[agreement(2)] + ([mixing] if step in (2, 7) else []) for step in range(10)]
        assert calls == expected


@pytest.mark.parametrize(("wire", "size"), [("float32", FLOAT), ("bf16", BF16)])
def test_codistillation_sends_weights_every_interval_and_nothing_else(wire: str, size: int) -> None:
    config = config_of(STALE | {"wire": wire}, 2, placement={"kind": "spread"}, train={"epochs": 4})
    for calls, parameters, statistics in run_world(2, calls_by_step, config, 3, 9):
        sent = Call("optimizer", "allgather_base", (0, 1), size * (parameters + statistics))
        assert calls == [[agreement(2)] + ([sent] if step in (6, 10) else []) for step in range(3, 12)]


def test_weights_of_two_residents_travel_in_one_buffer() -> None:
    hybrid = {"kind": "hybrid", "peers_per_rank": 2}
    for calls, parameters, _ in run_world(2, calls_by_step, config_of(DCL, 4, placement=hybrid), 3, 5):
        assert calls[4] == [agreement(2), Call("optimizer", "allgather_base", (0, 1), 2 * FLOAT * parameters)]


def test_weights_stay_in_the_exchange_group() -> None:
    for rank, (calls, parameters, statistics) in enumerate(
        run_world(4, calls_by_step, config_of(STALE, placement={"kind": "spread"}), 3, 4)
    ):
        replicas, exchanging = ((0, 1), (2, 3))[rank // 2], ((0, 2), (1, 3))[rank % 2]
        assert [call for call in calls[3] if call.part == "optimizer"] == [
            agreement(4),
            Call("optimizer", "allreduce", replicas, FLOAT * statistics),
            Call("optimizer", "allgather_base", exchanging, FLOAT * (parameters + statistics)),
        ]


def test_colocated_peers_send_no_weights() -> None:
    for method in (DCL, STALE):
        [(calls, _, _)] = run_world(1, calls_by_step, config_of(method), 0, 5)
        assert calls == [[]] * 5


@pytest.mark.parametrize("peers", [2, 3])
def test_dcm_is_one_all_gather_of_one_probability_tensor(peers: int) -> None:
    """N (C + 1) numbers where the three heads' logits are 3 N C."""
    config = config_of({"name": "dcm"}, peers, placement={"kind": "spread"})
    for calls, _, _ in run_world(peers, calls_by_step, config, 1, 2):
        sent = Call("exchange", "allgather_base", tuple(range(peers)), FLOAT * ROWS * (CLASSES + 1))
        assert calls == [[sent, agreement(peers)]] * 2


def sent_at_imagenet_size() -> list[list[int]]:
    """What one of two ranks puts in: DCM's signals for 128 rows of 1000 classes; then ResNet-50, by either method."""
    placement = Placement.even(2, 1, 2, dist.get_rank())
    exchange = Exchange(placement, group_of(placement.exchange_ranks))
    network = models.create("torchvision/resnet50", 1000)
    calls = []

    dcm = METHODS["dcm"]
    shown = {name: torch.zeros(128, 1000) for name in dcm.signals} | {"negentropy": torch.zeros(128, 1)}
    for _ in range(2):
        with Recorder() as recorder:
            exchange({placement.rank: shown}, private=dcm.private)
    calls.append([call.size for call in recorder.calls])

    for name, options in (("dcl", {"interval": 1}), ("codistillation", {"interval": 1, "wire": "bf16"})):
        method = METHODS[name]
        nothing: Any = None
        infos = [PeerInfo(k, 1000, 0, (), nothing, nothing, torch.nn.Identity) for k in range(2)]
        made = method(method.Options(**options), infos)
        if name == "codistillation":
            made.copies = torch.nn.ModuleList([network, network])
        after = AfterStep(
            residents={placement.rank: torch.nn.ModuleDict({"network": network})},
            exchange=exchange,
            average_buffers=lambda: None,
            everywhere=[],
            skipped=torch.zeros(1),
            progress=Progress(0, 10, 1),
        )
        made.after_step(after)
        with Recorder() as recorder:
            made.after_step(after)
        calls.append([call.size for call in recorder.calls])
    return calls


@pytest.mark.slow
def test_bytes_are_those_of_the_papers_table() -> None:
    """N = 128, C = 1000: one probability tensor is 512,000 B, to which DCM adds 4 B a row; ResNet-50's parameters are
    102,228,128 B, and its BatchNorm statistics 53,120 numbers."""
    for calls in run_world(2, sent_at_imagenet_size):
        assert calls == [[512_000 + 512], [102_228_128], [(25_557_032 + 53_120) * 2]]


# -- going on after a stop --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", [DCL, STALE, slow({"name": "dcm"})], ids=lambda m: m["name"])
def test_a_run_stopped_between_two_exchanges_goes_on_bit_by_bit(
    tiny: Path, tmp_path: Path, method: dict[str, Any]
) -> None:
    """Stopped after step 6: DCL has mixed after step 3 and will after step 8, copies are of step 3 and then of 7."""
    config = small_run(
        tiny,
        tmp_path,
        method,
        checkpoint={"every_steps": 2, "keep": 9},
        log={"progress": False, "every_steps": 1},
        train={"epochs": 2, "ema_decay": 0.9},
    )
    run_ranks(2, train_here, config)
    expected, lines = final_state(tmp_path), numbers(tmp_path)
    for step in checkpoint.steps_on_disk(tmp_path):
        if step > 6:
            checkpoint.folder_of(tmp_path, step).rename(tmp_path / f"elsewhere_{step}")
    run_ranks(2, train_here, config)
    assert_same_state(final_state(tmp_path), expected)
    assert numbers(tmp_path) == lines


def test_stale_copies_go_on_on_another_number_of_ranks(tiny: Path, tmp_path: Path) -> None:
    config = small_run(tiny, tmp_path, STALE, checkpoint={"every_steps": 2, "keep": 9})
    run_ranks(2, train_here, config)
    expected = final_state(tmp_path)
    for step in checkpoint.steps_on_disk(tmp_path):
        if step > 6:
            checkpoint.folder_of(tmp_path, step).rename(tmp_path / f"elsewhere_{step}")
    run_ranks(1, train_here, config)
    assert_same_state(final_state(tmp_path), expected, relative=1e-5)


# -- what leaves, and what may not come in ----------------------------------------------------------------------------


@pytest.mark.parametrize("method", [{"name": "dcm"}, DCL, STALE], ids=lambda m: m["name"])
def test_what_is_exported_is_the_plain_network(tiny: Path, tmp_path: Path, method: dict[str, Any]) -> None:
    peers = UNLIKE if method["name"] != "dcl" else 2
    run_ranks(1, train_here, small_run(tiny, tmp_path, method, peers, train={"epochs": 1}))
    run_command("export", str(tmp_path))
    trained = weights(tmp_path)
    for name in loading.verify(checkpoint.folder_of(tmp_path, 5)).peers:
        network = models.load_network(tmp_path / "export" / f"{name}.json")
        plain = "cifar_wrn_16_1" if "wrn" in name else "cifar_resnet8_b"
        options = {} if "wrn" in name else {"width": 4}
        assert network.state_dict().keys() == models.create(plain, 10, 1, **options).state_dict().keys()
        assert all(torch.equal(x, trained[f"{name}/{key}"]) for key, x in network.state_dict().items())


def test_dcl_refuses_peers_that_differ_by_name() -> None:
    with pytest.raises(ConfigError) as error:
        config_of({"name": "dcl"}, UNLIKE)
    assert str(error.value) == (
        "peers: dcl needs peers of one network with the same options; found cifar_resnet8_b {'width': 4}, "
        "cifar_wrn_16_1"
    )
    with pytest.raises(ConfigError, match=r"found cifar_resnet8_b, cifar_resnet8_b \{'width': 4\}$"):
        config_of({"name": "dcl"}, [UNLIKE[0], {"network": "cifar_resnet8_b", "name": "other"}])


def test_dcm_refuses_networks_without_stages_before_anything_is_started(tiny: Path, tmp_path: Path) -> None:
    plain = {"network": "timm/vit_tiny_patch16_224", "options": {"img_size": 28, "patch_size": 4, "depth": 2}}
    with pytest.raises(ConfigError) as error:
        check_run(small_run(tiny, tmp_path, {"name": "dcm"}, [UNLIKE[0], plain]), Launch(0, 0, 1))
    assert str(error.value) == (
        "method.name = dcm: cannot train timm/vit_tiny_patch16_224 on images of 28 pixels: VisionTransformer has no "
        "stages: no feature maps that shrink from one to the next"
    )
    check_run(small_run(tiny, tmp_path, {"name": "dcm"}, UNLIKE), Launch(0, 0, 1))


def test_dcm_refuses_networks_that_its_classifiers_cannot_go_on_from_before_anything_is_started(
    tiny: Path, tmp_path: Path
) -> None:
    with pytest.raises(ConfigError) as error:
        check_run(
            small_run(tiny, tmp_path, {"name": "dcm"}, [UNLIKE[0], {"network": "cifar_wrn_10_2"}]), Launch(0, 0, 1)
        )
    assert str(error.value) == (
        "method.name = dcm: cannot train cifar_wrn_10_2 on images of 28 pixels: DCM's classifier after stage 1 halves "
        "the 1 block of stage 3; expected depth >= 16"
    )


@pytest.mark.parametrize("method", [{"name": "dml"}, DCL, STALE], ids=lambda m: m["name"])
def test_methods_that_look_at_no_maps_train_networks_without_stages(method: dict[str, Any]) -> None:
    options = {"img_size": 16, "patch_size": 4, "depth": 1, "embed_dim": 12, "num_heads": 2}
    peers = [{"network": "timm/vit_tiny_patch16_224", "copies": 2, "options": options}]
    [seen] = run_world(1, states_after, config_of(method, peers), [0])
    assert not torch.equal(seen[1][0]["0/network.head.weight"], seen[0][0]["0/network.head.weight"])


def test_private_signals_stay_where_they_are() -> None:
    private, shown = {"ep1", "ep2", "logits", "log_ep1", "log_ep2", "log_logits"}, {"probabilities", "negentropy"}
    for rank, found in enumerate(run_world(2, what_dcm_sees)):
        assert [set(peer) for peer in found] == [private | shown if k == rank else shown for k in range(2)]


def what_dcm_sees() -> Any:
    cohort: Cohort = cohort_of(config_of({"name": "dcm"}, placement={"kind": "spread"}))
    [(_, [batch])] = batches(cohort, [0])
    own = cohort.forward(batch, Progress(0, STEPS_PER_EPOCH, 2), 0, range(2))
    signals = cohort.exchange(own, cohort.method.exchange, private=cohort.method.private)
    return [{name: x.detach() for name, x in peer.items()} for peer in signals]

"""What the contract of a method can carry, shown by methods made up here: heads, shared modules, gradients across
ranks, parameter communication, dropout. Colocated and spread must agree for each of them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from engine.cohort.randomness import Streams
from engine.config import RunConfig
from losses import Method, MethodOptions, PeerInfo, Progress, Signals, Terms
from losses.capabilities import ActsAfterStep, AfterStep
from losses.functional import cross_entropy
from tests.engine.stepping import CPU, cohort_of, config_of, do_steps, joined, state, train_states
from tests.runs import assert_same_weights
from tests.worlds import run_world

STEPS = 5
PLACEMENTS: dict[str, tuple[int, dict[str, Any]]] = {
    "colocated": (1, {"kind": "colocated"}),
    "spread": (2, {"kind": "spread"}),
    "colocated over 2 replicas": (2, {"kind": "colocated"}),
    "spread over 2 replicas": (4, {"kind": "spread"}),
}


DONE: dict[Any, dict[str, Tensor]] = {}
"""Runs are deterministic, so that one serves several tests."""


def trained(method: type[Method], placement: str, peers: Any = 2, **sections: Any) -> dict[str, Tensor]:
    """The parameters of all peers, heads and the method after 5 steps; equal bits wherever they are held twice."""
    ranks, section = PLACEMENTS[placement]
    key = (method.name, ranks, repr((section, peers, sections)))
    if key not in DONE:
        config = config_of({"name": "independent"}, peers, placement=section, **sections)
        DONE[key] = joined(run_world(ranks, train_states, with_method(config, method), STEPS, method))
    return DONE[key]


def with_method(config: RunConfig, method: type[Method]) -> RunConfig:
    return config.model_copy(update={"method": method.Options(name=method.name)})


def differ(one: dict[str, Tensor], other: dict[str, Tensor], only: str = "") -> None:
    """Some parameter differs by far more than rounding."""
    with pytest.raises(AssertionError):
        assert_same_weights(
            {k: v for k, v in one.items() if only in k}, {k: v for k, v in other.items() if only in k}, 1e-3
        )


BOTH_WAYS = pytest.mark.parametrize(
    ("spread", "colocated"), [("spread", "colocated"), ("spread over 2 replicas", "colocated over 2 replicas")]
)

# -- heads ------------------------------------------------------------------------------------------------------------


class Embed(nn.Module):
    def __init__(self, wide: int, narrow: int) -> None:
        super().__init__()
        self.project = nn.Linear(wide, narrow)

    def forward(self, signals: Signals) -> dict[str, Tensor]:
        return {"embedding": torch.tanh(self.project(signals["features"]))}


class Relations(Method):
    """Peers match the similarities between the rows of the batch, which have one shape at any width."""

    name = "relations"
    Options = MethodOptions
    signals = ("logits", "embedding")

    def head(self, peer: PeerInfo) -> nn.Module:
        return Embed(peer.num_features, 3 + 2 * peer.index)

    def forward(
        self, residents: Sequence[int], signals: Sequence[Signals], targets: Tensor, progress: Progress
    ) -> Terms:
        assert [s["embedding"].shape[1] for s in signals] == [3, 5]
        similar = [s["embedding"] @ s["embedding"].T for s in signals]
        terms: Terms = {}
        for k in residents:
            terms[k, "ce"] = cross_entropy(signals[k]["logits"], targets)
            terms[k, "relations"] = F.mse_loss(similar[k], similar[1 - k].detach())
        return terms


UNLIKE = [{"network": "cifar_resnet8_b", "options": {"width": 4}}, {"network": "cifar_wrn_10_1"}]


@BOTH_WAYS
def test_heads_of_unlike_peers_show_signals_of_unlike_widths(spread: str, colocated: str) -> None:
    expected = trained(Relations, colocated, UNLIKE)
    assert expected["0/head.project.weight"].shape == (3, 16)
    assert expected["1/head.project.weight"].shape == (5, 64)
    assert_same_weights(trained(Relations, spread, UNLIKE), expected)


def test_heads_learn_and_are_drawn_alike_everywhere() -> None:
    config = with_method(config_of({"name": "independent"}, UNLIKE, placement={"kind": "spread"}), Relations)
    before = joined(run_world(2, train_states, config, 0, Relations))
    differ(trained(Relations, "spread", UNLIKE), before, "head")


# -- shared modules ---------------------------------------------------------------------------------------------------


class Gated(Method):
    """A gate mixes all logits into an ensemble that learns the classes and teaches every peer. Nothing is detached, so
    every term of the ensemble depends on every peer, and on the gate."""

    name = "gated"
    Options = MethodOptions

    def __init__(self, options: MethodOptions, peers: Sequence[PeerInfo]) -> None:
        super().__init__(options, peers)
        self.gate = nn.Linear(sum(p.num_classes for p in peers), len(peers))

    def forward(
        self, residents: Sequence[int], signals: Sequence[Signals], targets: Tensor, progress: Progress
    ) -> Terms:
        logits = torch.stack([s["logits"] for s in signals])
        mix = self.gate(torch.cat(list(logits), dim=1)).softmax(-1)
        ensemble = torch.einsum("nk,knc->nc", mix, logits)
        terms: Terms = {(k, "ce"): cross_entropy(logits[k], targets) for k in residents}
        terms[None, "ensemble"] = cross_entropy(ensemble, targets)
        log_q = ensemble.log_softmax(-1)
        each = [F.kl_div(z.log_softmax(-1), log_q, reduction="batchmean", log_target=True) for z in logits]
        terms[None, "kl"] = torch.stack(each).sum()
        return terms


@BOTH_WAYS
def test_a_shared_gate_and_targets_that_carry_gradient(spread: str, colocated: str) -> None:
    expected = trained(Gated, colocated)
    assert "method/gate.weight" in expected
    assert_same_weights(trained(Gated, spread), expected)


def test_the_gate_stays_equal_where_peers_are_dealt_in_pairs() -> None:
    hybrid = {"kind": "hybrid", "peers_per_rank": 2}
    states = [
        joined(run_world(ranks, train_states, with_method(config, Gated), STEPS, Gated))
        for ranks, config in (
            (1, config_of({"name": "independent"}, 4, placement={"kind": "colocated"})),
            (2, config_of({"name": "independent"}, 4, placement=hybrid)),
            (4, config_of({"name": "independent"}, 4, placement={"kind": "spread"})),
        )
    ]
    assert_same_weights(states[1], states[0])
    assert_same_weights(states[2], states[0])


def test_clipping_sees_the_same_gradient_of_the_gate_everywhere() -> None:
    """The norm of a shared module is that of its averaged gradient; a factor between placements would show here."""
    clipped = {p: trained(Gated, p, train={"epochs": 2, "clip_norm": 0.05}) for p in ("spread", "colocated")}
    assert_same_weights(clipped["spread"], clipped["colocated"])
    differ(clipped["spread"], trained(Gated, "spread"), "gate")


def test_the_gate_learns() -> None:
    config = config_of({"name": "independent"}, placement={"kind": "spread"})
    before = joined(run_world(2, train_states, with_method(config, Gated), 0, Gated))
    differ(trained(Gated, "spread"), before, "gate")


# -- gradients across ranks -------------------------------------------------------------------------------------------


class Consensus(Method):
    """Each peer has its own share of the objective only: the distance to the mean of the peers' probabilities. The
    mean depends on all peers, so that the gradients of the others' shares must come back through the exchange."""

    name = "consensus"
    Options = MethodOptions
    exchange: Literal["none", "detached", "differentiable"] = "differentiable"

    def forward(
        self, residents: Sequence[int], signals: Sequence[Signals], targets: Tensor, progress: Progress
    ) -> Terms:
        mean = torch.stack([s["logits"].softmax(-1) for s in signals]).mean(0)
        terms: Terms = {}
        for k in residents:
            terms[k, "ce"] = cross_entropy(signals[k]["logits"], targets)
            terms[k, "consensus"] = (1 + k) * F.kl_div(
                signals[k]["logits"].log_softmax(-1), mean, reduction="batchmean"
            )
        return terms


class ConsensusCutOff(Consensus):
    """As it would be if the gradients of the other shares were lost."""

    name = "consensus_cut_off"
    exchange = "detached"


@BOTH_WAYS
def test_gradients_of_other_shares_come_back(spread: str, colocated: str) -> None:
    expected = trained(Consensus, colocated)
    assert_same_weights(trained(Consensus, spread), expected)


def test_gradients_come_back_from_several_peers_at_once() -> None:
    placed = [(1, {"kind": "colocated"}), (3, {"kind": "spread"})]
    states = [
        joined(
            run_world(
                ranks,
                train_states,
                with_method(config_of({"name": "independent"}, 3, placement=section), Consensus),
                STEPS,
                Consensus,
            )
        )
        for ranks, section in placed
    ]
    assert_same_weights(states[1], states[0])


def test_without_them_the_numbers_would_be_others() -> None:
    differ(trained(ConsensusCutOff, "spread"), trained(Consensus, "colocated"))


# -- after the step ---------------------------------------------------------------------------------------------------


class Communicate(ActsAfterStep, Method):
    """Every second step each peer moves half-way to the mean of all peers' parameters. No signal is exchanged."""

    name = "communicate"
    Options = MethodOptions
    exchange: Literal["none", "detached", "differentiable"] = "none"

    def forward(
        self, residents: Sequence[int], signals: Sequence[Signals], targets: Tensor, progress: Progress
    ) -> Terms:
        return {(k, "ce"): cross_entropy(signals[k]["logits"], targets) for k in residents}

    @torch.no_grad()
    def after_step(self, after: AfterStep) -> None:
        if (after.progress.step + 1) % 2:
            return
        own = {k: dict(peer.named_parameters()) for k, peer in after.residents.items()}
        everyones = after.exchange(own)
        mean = {name: torch.stack([p[name] for p in everyones]).mean(0) for name in everyones[0]}
        for parameters in own.values():
            for name, x in parameters.items():
                x.lerp_(mean[name], 0.5)


class Silent(Communicate):
    name = "silent"

    def after_step(self, after: AfterStep) -> None:
        pass


@BOTH_WAYS
def test_parameters_travel_after_the_step(spread: str, colocated: str) -> None:
    expected = trained(Communicate, colocated)
    assert_same_weights(trained(Communicate, spread), expected)


def communicated_once(method: type[Method]) -> Any:
    """The state after 2 steps, the second of which ends with the communication."""
    return train_states(with_method(config_of({"name": "independent"}, 3), method), 2, method)


def test_after_step_sees_the_parameters_that_the_optimiser_has_just_written() -> None:
    silent, after = (run_world(1, communicated_once, method)[0] for method in (Silent, Communicate))
    for name in ("network.conv1.weight", "network.fc.bias", "network.layer2.0.bn1.weight"):
        x = [silent[f"{k}/{name}"].double() for k in range(3)]
        for k in range(3):
            torch.testing.assert_close(
                after[f"{k}/{name}"].double(), 0.5 * x[k] + 0.5 * sum(x) / 3, rtol=1e-6, atol=1e-7
            )


# -- dropout ----------------------------------------------------------------------------------------------------------


def dropping(dropout: float, peers: int) -> list[dict[str, Any]]:
    return [{"network": "cifar_wrn_10_1", "copies": peers, "options": {"dropout": dropout}}]


def dropped(ranks: int, dropout: float, peers: int, **placement: Any) -> dict[str, Tensor]:
    config = config_of({"name": "dml"}, dropping(dropout, peers), placement=placement)
    return joined(run_world(ranks, train_states, config, STEPS))


def test_dropout_draws_the_same_masks_wherever_a_peer_lives() -> None:
    colocated = dropped(1, 0.4, 2, kind="colocated")
    assert_same_weights(dropped(2, 0.4, 2, kind="spread"), colocated)
    differ(dropped(1, 0.0, 2, kind="colocated"), colocated)


def test_dropout_draws_the_same_masks_on_replicas_of_either_placement() -> None:
    assert_same_weights(dropped(4, 0.4, 2, kind="spread"), dropped(2, 0.4, 2, kind="colocated"))


def test_masks_differ_between_seeds_peers_steps_micro_batches_and_replicas() -> None:
    def draw(seed: int, peer: int, step: int, micro: int, replica: int) -> tuple[float, ...]:
        Streams(seed, 2, replica, CPU).before_peer(peer, step, micro)
        return tuple(torch.rand(4).tolist())

    drawn = []
    for words in [(0, 0, 0, 0, 0), (1, 0, 0, 0, 0), (0, 1, 0, 0, 0), (0, 0, 1, 0, 0), (0, 0, 0, 1, 0), (0, 0, 0, 0, 1)]:
        drawn.append(draw(*words))
    assert len(set(drawn)) == 6
    assert draw(0, 0, 0, 0, 0) == drawn[0]


# -- a method's state in a skipped step -------------------------------------------------------------------------------


class Centred(Method):
    """Keeps a moving mean of the logits that it sees, in a buffer."""

    name = "centred"
    Options = MethodOptions

    def __init__(self, options: MethodOptions, peers: Sequence[PeerInfo]) -> None:
        super().__init__(options, peers)
        self.register_buffer("centre", torch.zeros(peers[0].num_classes))

    def forward(
        self, residents: Sequence[int], signals: Sequence[Signals], targets: Tensor, progress: Progress
    ) -> Terms:
        with torch.no_grad():
            self.centre.lerp_(torch.stack([s["logits"] for s in signals]).mean((0, 1)), 0.1)
        return {(k, "ce"): cross_entropy(signals[k]["logits"] - self.centre, targets) for k in residents}


def spoil_step_1(step: int, rank: int, images: Tensor) -> None:
    if step == 1 and rank == 0:
        images[0] = torch.nan


def centre_around_a_spoilt_step(config: RunConfig) -> Any:
    cohort = cohort_of(with_method(config, Centred), method=Centred)
    states, done = [state(cohort)], []
    for step in range(3):
        done += do_steps(cohort, [step], spoil=spoil_step_1)
        states.append(state(cohort))
    return [s["method/centre"] for s in states], [skipped for _, skipped in done]


@pytest.mark.parametrize("ranks", [1, 2])
def test_a_skipped_step_leaves_the_buffers_of_a_method_as_they_were(ranks: int) -> None:
    placement = {"kind": "spread" if ranks == 2 else "colocated"}
    for centres, skipped in run_world(
        ranks, centre_around_a_spoilt_step, config_of({"name": "independent"}, placement=placement)
    ):
        assert skipped == [0, 1, 0]
        assert torch.equal(centres[1], centres[2])
        assert not torch.equal(centres[2], centres[3])
        assert centres[3].isfinite().all()

"""What the contract carries beyond whole networks: a shared trunk, views of one's own, taps and auxiliary classifiers,
shown by methods made up here. Every placement must agree, on the trunk's BatchNorm statistics too."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar, Literal

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from losses import Method, MethodOptions, PeerInfo, Progress, Signals, Terms
from losses.capabilities import SharedTrunk, StageTaps
from models.stages import plain_state
from tests.engine.stepping import cohort_of, config_of, do_steps
from tests.marks import slow
from tests.runs import assert_same_weights
from tests.worlds import run_world


class GatedOptions(MethodOptions):
    name: Literal["gated"] = "gated"


class Gated(SharedTrunk, Method):
    """In the manner of ONE: a gate on the trunk's map mixes the branches' logits into their teacher, and learns."""

    name = "gated"
    Options = GatedOptions

    def __init__(self, options: Any, peers: Sequence[PeerInfo]) -> None:
        super().__init__(options, peers)
        self.gate = nn.Linear(peers[0].stages[1][0], len(peers))

    @classmethod
    def trunk(cls, options: Any, num_stages: int) -> int | None:
        return 2

    def forward(
        self, residents: Sequence[int], signals: Sequence[Signals], targets: Tensor, progress: Progress
    ) -> Terms:
        gate = self.gate(signals[residents[0]]["trunk"].mean((2, 3))).softmax(-1)
        mixed = sum(gate[:, k, None] * peer["logits"] for k, peer in enumerate(signals))
        terms: Terms = {(None, "ce"): F.cross_entropy(mixed, targets)}
        for k in residents:
            terms[k, "ce"] = F.cross_entropy(signals[k]["logits"], targets)
            teacher = mixed.detach().softmax(-1)
            terms[k, "kl"] = F.kl_div(signals[k]["logits"].log_softmax(-1), teacher, reduction="batchmean")
        return terms


class MeanGated(Gated):
    """The trunk follows the mean of the branches' gradients, as in CL-ILR."""

    name = "mean_gated"
    trunk_gradient = "mean"


class Branched(Gated):
    """The same without a gate, so that each branch may see the trunk on a view of its own, as in PCL."""

    name = "branched"

    def __init__(self, options: Any, peers: Sequence[PeerInfo]) -> None:
        Method.__init__(self, options, peers)

    def forward(
        self, residents: Sequence[int], signals: Sequence[Signals], targets: Tensor, progress: Progress
    ) -> Terms:
        mean = torch.stack([peer["logits"] for peer in signals]).mean(0).detach().softmax(-1)
        terms: Terms = {}
        for k in residents:
            terms[k, "ce"] = F.cross_entropy(signals[k]["logits"], targets)
            terms[k, "kl"] = F.kl_div(signals[k]["logits"].log_softmax(-1), mean, reduction="batchmean")
        return terms


class Deep(StageTaps, Method):
    """In the manner of DCM: an auxiliary classifier after stage 1 teaches the other peers, and learns from them."""

    name = "deep"
    Options = GatedOptions
    signals: ClassVar[tuple[str, ...]] = ("logits", "early")

    @classmethod
    def taps(cls, options: Any, num_stages: int) -> Sequence[int]:
        return (1,)

    def head(self, peer: PeerInfo) -> nn.Module | None:
        return Early(peer.auxiliary(1, "dcm"))

    def forward(
        self, residents: Sequence[int], signals: Sequence[Signals], targets: Tensor, progress: Progress
    ) -> Terms:
        terms: Terms = {}
        for k in residents:
            for name in ("logits", "early"):
                terms[k, f"ce_{name}"] = F.cross_entropy(signals[k][name], targets)
                for j, other in enumerate(signals):
                    if j != k:
                        teacher = other["early"].detach().softmax(-1)
                        student = signals[k][name].log_softmax(-1)
                        terms[k, f"kl_{name}_{j}"] = F.kl_div(student, teacher, reduction="batchmean")
        return terms


class Early(nn.Module):
    def __init__(self, classifier: nn.Module) -> None:
        super().__init__()
        self.classifier = classifier

    def forward(self, signals: Signals) -> dict[str, Tensor]:
        return {"early": self.classifier(signals["stage1"])["logits"]}


def _train(config: Any, method: type[Method], views: str) -> dict[str, Any]:
    """Two steps from a seed at which rounding does not turn a ReLU at zero, after which nothing could be compared.

    Returns:
        Every tensor of the residents' networks and of what is shared, after the buffers have met.
    """
    config = config.model_copy(
        update={
            "seed": 3,
            "method": GatedOptions.model_construct(name=method.name),
            "data": config.data.model_copy(update={"views": views}),
        }
    )
    cohort = cohort_of(config, method=method)
    do_steps(cohort, range(2))
    cohort.average_buffers()
    state = {f"{k}/{name}": x.clone() for k, r in cohort.residents.items() for name, x in plain_state(r.whole).items()}
    heads = {
        f"{k}/{n}": x.clone()
        for k, r in cohort.residents.items()
        if r.peer.head
        for n, x in r.peer.head.state_dict().items()
    }
    shared = {f"shared/{name}": x.clone() for name, x in cohort.shared.state_dict().items()}
    return state | heads | shared


def _together(ranks: list[dict[str, Any]]) -> dict[str, Any]:
    return {name: x for rank in ranks for name, x in rank.items()}


CASES = [
    (Gated, "shared"),
    slow(MeanGated, "shared"),
    slow(Branched, "shared"),
    (Branched, "per_peer"),
    (Deep, "shared"),
    slow(Deep, "per_peer"),
]
PEERS = [{"network": "cifar_resnet8_b", "copies": 4, "options": {"width": 4}}]


@pytest.mark.parametrize(("method", "views"), CASES)
def test_every_placement_gives_the_same_weights(method: type[Method], views: str) -> None:
    colocated = _together(run_world(1, _train, config_of(peers=PEERS), method, views))
    spread = run_world(4, _train, config_of(peers=PEERS), method, views)
    hybrid = config_of(peers=PEERS, placement={"kind": "hybrid", "peers_per_rank": 2})
    assert_same_weights(_together(spread), colocated)
    assert_same_weights(_together(run_world(2, _train, hybrid, method, views)), colocated)
    for rank in spread[1:]:
        for name, x in spread[0].items():
            if name.startswith("shared/"):
                assert torch.equal(rank[name], x), name


@pytest.mark.parametrize(("method", "views"), CASES)
def test_replicas_agree_with_as_many_replicas_of_everything(method: type[Method], views: str) -> None:
    two = config_of(peers=[{**PEERS[0], "copies": 2}])
    colocated = config_of(peers=[{**PEERS[0], "copies": 2}], placement={"kind": "colocated"})
    spread = run_world(4, _train, two, method, views)
    assert_same_weights(_together(spread), _together(run_world(2, _train, colocated, method, views)))


def test_mean_and_sum_of_the_branches_gradients_differ() -> None:
    runs = [_together(run_world(1, _train, config_of(peers=PEERS), method, "shared")) for method in (Gated, MeanGated)]
    with pytest.raises(AssertionError):
        assert_same_weights(*runs, 1e-2)


def test_views_of_their_own_make_a_difference() -> None:
    runs = [
        _together(run_world(1, _train, config_of(peers=PEERS), Branched, views)) for views in ("shared", "per_peer")
    ]
    with pytest.raises(AssertionError):
        assert_same_weights(*runs, 1e-3)


def test_branches_share_the_trunk_and_nothing_else() -> None:
    state = _together(run_world(1, _train, config_of(peers=PEERS), Branched, "shared"))
    assert torch.equal(state["0/layer2.0.conv1.weight"], state["3/layer2.0.conv1.weight"])
    assert not torch.equal(state["0/layer3.0.conv1.weight"], state["3/layer3.0.conv1.weight"])

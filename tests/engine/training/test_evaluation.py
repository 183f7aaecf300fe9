"""Evaluation counts every image exactly once: from any ranks, placement and batch size the same scores as from a plain
loop over single images."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
from torch import nn

import models
from data_pipelines import Batch
from data_pipelines.config import DataConfig
from data_pipelines.resident import ResidentSet
from engine.ranks.collectives import group_of
from engine.ranks.exchanging.exchange import Exchange
from engine.ranks.placement import Placement
from engine.training.calibration import excess
from engine.training.evaluation import Score, Scores, evaluate
from tests.worlds import run_world

CPU = torch.device("cpu")
IMAGES = 37


def networks(peers: int, root: Path) -> list[nn.Module]:
    """Untrained but with opinions: logits are large, and no class is preferred for all images."""
    [rows] = Cut(root).evaluate(0, 1, IMAGES)
    made = []
    for k in range(peers):
        torch.manual_seed(k)
        network = models.create("cifar_resnet8_b", 10, 1, width=4)
        with torch.no_grad():
            network(rows.images)  # BatchNorm statistics of something, which evaluation must use.
            network.fc.weight.mul_(8)
            network.eval()
            network.fc.bias.sub_(network(rows.images).mean(0))
        made.append(network.train())
    return made


class Cut(ResidentSet):
    """The real images, but only the first few."""

    def __init__(self, root: Path, size: int = IMAGES) -> None:
        super().__init__(DataConfig(dataset="fashion_mnist", root=root, global_batch=12), 0, CPU)
        self.eval_size = size


class Repeats(Cut):
    """Gives the first image in place of the second."""

    def evaluate(self, part: int, parts: int, batch: int) -> Iterator[Batch]:
        for rows in super().evaluate(part, parts, batch):
            ids = torch.where(rows.ids == 1, 0, rows.ids)
            yield Batch(rows.views, rows.targets, ids)


class Loses(Cut):
    """Loses the last image of each batch."""

    def evaluate(self, part: int, parts: int, batch: int) -> Iterator[Batch]:
        for rows in super().evaluate(part, parts, batch):
            yield Batch((rows.images[:-1],), rows.targets[:-1], rows.ids[:-1])


def scored(peers: list[nn.Module], peers_per_rank: int, pipeline: Any, batches: list[int]) -> list[Scores]:
    placement = Placement.even(len(peers), peers_per_rank, dist.get_world_size(), dist.get_rank())
    # Signals of training travel in bf16 here; scores must not show it.
    exchange = Exchange(placement, group_of(placement.exchange_ranks), torch.bfloat16)
    own = {k: peers[k] for k in placement.residents}
    return [evaluate(own, exchange, placement, pipeline, batch=batch, device=CPU) for batch in batches]


def by_hand(peers: list[nn.Module], pipeline: ResidentSet) -> Scores:
    """Image by image, in float64."""
    k, n = len(peers), pipeline.eval_size
    right, losses, different = np.zeros((k + 1, 2)), np.zeros(k + 1), 0
    bins: list[list[list[float]]] = [[[] for _ in range(15)] for _ in range(k + 1)]
    all_p, all_z = [], []
    for network in peers:
        network.eval()
    for rows in pipeline.evaluate(0, 1, 1):
        y = int(rows.targets[0])
        with torch.no_grad():
            logits = [network(rows.images)[0].double().numpy() for network in peers]
        p = [np.exp(z - z.max()) / np.exp(z - z.max()).sum() for z in logits]
        all_p.append([*p, sum(p) / k])
        all_z.append([z - z.mean() for z in logits])
        for i, q in enumerate([*p, sum(p) / k]):
            order = np.argsort(-q, kind="stable")
            right[i] += [order[0] == y, y in order[:5]]
            losses[i] -= math.log(q[y])
            bins[i][max(0, math.ceil(15 * q.max()) - 1)].append(q.max() - (order[0] == y))
        different += sum(a.argmax() != b.argmax() for a, b in itertools.combinations(p, 2))
    for network in peers:
        network.train()
    p_of, z_of = (np.array(each).transpose(1, 0, 2) for each in (all_p, all_z))
    spread = [float(((q - q.mean(0)) ** 2).sum() / (q**2).sum()) for q in p_of]
    apart = [
        min(float(((z - other) ** 2).sum() / (((z**2).sum() + (other**2).sum()) / 2)) for other in others)
        for z, others in ((z_of[i], [z_of[j] for j in range(k) if j != i]) for i in range(k))
        if others
    ]
    # |accuracy - confidence| of each bin, by its share of the images.
    errors = [sum(len(b) / n * abs(float(np.mean(b))) for b in row if b) for row in bins]
    scores = [
        Score(100 * a / n, 100 * b / n, loss / n, s, ece)
        for (a, b), loss, s, ece in zip(right, losses, spread, errors, strict=True)
    ]
    return Scores(scores[:-1], scores[-1], 100 * different / (n * max(math.comb(k, 2), 1)), apart)


def assert_same_scores(found: Scores, expected: Scores) -> None:
    for one, other in zip([*found.peers, found.ensemble], [*expected.peers, expected.ensemble], strict=True):
        assert (one.top1, one.top5) == pytest.approx((other.top1, other.top5), rel=1e-12)
        assert one.loss == pytest.approx(other.loss, rel=1e-5)
        assert one.spread == pytest.approx(other.spread, rel=1e-4)
        assert one.ece == pytest.approx(other.ece, abs=1e-6)
    assert found.apart == pytest.approx(expected.apart, rel=1e-4)
    assert found.disagreement == pytest.approx(expected.disagreement, rel=1e-12)


# 37 images are no multiple of anything here, so parts and last batches are uneven.
@pytest.mark.parametrize(
    ("peers", "ranks", "peers_per_rank"),
    [
        pytest.param(2, 1, 2, id="2 peers colocated"),
        pytest.param(2, 3, 2, id="2 peers colocated over 3 replicas"),
        pytest.param(2, 2, 1, id="2 peers spread"),
        pytest.param(2, 4, 1, id="2 peers spread over 2 replicas"),
        pytest.param(3, 3, 1, id="3 peers spread"),
        pytest.param(4, 2, 2, id="4 peers hybrid"),
        pytest.param(4, 4, 2, id="4 peers hybrid over 2 replicas"),
        pytest.param(1, 2, 1, id="1 peer over 2 replicas"),
    ],
)
def test_every_placement_and_batch_scores_as_a_loop_over_single_images(
    tiny: Path, peers: int, ranks: int, peers_per_rank: int
) -> None:
    cohort, pipeline = networks(peers, tiny), Cut(tiny)
    expected = by_hand(cohort, pipeline)
    for scores in run_world(ranks, scored, cohort, peers_per_rank, pipeline, [3, 500]):
        for found in scores:
            assert_same_scores(found, expected)


def test_the_scores_are_not_trivial(tiny: Path) -> None:
    """The equalities above would hold for networks that always name one class, too."""
    scores = by_hand(networks(3, tiny), Cut(tiny))
    assert len({score.top1 for score in [*scores.peers, scores.ensemble]}) > 1
    assert all(score.top1 < score.top5 < 100 for score in scores.peers)
    assert 0 < scores.disagreement < 100
    one = by_hand(networks(1, tiny), Cut(tiny))
    assert one.ensemble == one.peers[0]
    assert one.disagreement == 0


@pytest.mark.parametrize(("ranks", "peers_per_rank", "images"), [(4, 2, 3), (4, 1, 1), (3, 2, 1)])
def test_fewer_images_than_ranks(tiny: Path, ranks: int, peers_per_rank: int, images: int) -> None:
    cohort, pipeline = networks(2, tiny), Cut(tiny, images)
    expected = by_hand(cohort, pipeline)
    for [found] in run_world(ranks, scored, cohort, peers_per_rank, pipeline, [2]):
        assert_same_scores(found, expected)


def refused(peers: list[nn.Module], peers_per_rank: int, pipeline: Any) -> str:
    try:
        scored(peers, peers_per_rank, pipeline, [8])
    except RuntimeError as error:
        return str(error)
    return "accepted"


@pytest.mark.parametrize(("kind", "counted"), [(Repeats, 37), (Loses, 37 - 6)])
def test_an_image_twice_or_never_is_an_error_on_all_ranks(tiny: Path, kind: type[Cut], counted: int) -> None:
    # Spread over 2 replicas: parts of 18 and 19 images, in 3 batches each.
    messages = run_world(4, refused, networks(2, tiny), 1, kind(tiny))
    assert len(set(messages)) == 1
    assert messages[0].startswith(f"evaluation counted {counted} images")
    assert "the validation split has 37, each once" in messages[0]


def modes_after_evaluation(peers: list[nn.Module], pipeline: Any) -> Any:
    peers[1].eval()
    before = [{name: x.clone() for name, x in network.state_dict().items()} for network in peers]
    scored(peers, 2, pipeline, [10])
    untouched = all(
        torch.equal(x, old[name])
        for network, old in zip(peers, before, strict=True)
        for name, x in network.state_dict().items()
    )
    return [[module.training for module in network.modules()] for network in peers], untouched


def test_networks_come_back_in_the_mode_they_were_in_and_unchanged(tiny: Path) -> None:
    [(modes, untouched)] = run_world(1, modes_after_evaluation, networks(2, tiny), Cut(tiny))
    assert [set(mode) for mode in modes] == [{True}, {False}]
    assert untouched


def bf16_scores(peers: list[nn.Module], pipeline: Any) -> Scores:
    placement = Placement.even(2, 2, 1, 0)
    exchange = Exchange(placement, group_of(placement.exchange_ranks))
    return evaluate(
        dict(enumerate(peers)), exchange, placement, pipeline, batch=10, device=CPU, autocast=torch.bfloat16
    )


def test_autocast_changes_the_loss_a_little(tiny: Path) -> None:
    cohort, pipeline = networks(2, tiny), Cut(tiny)
    [found], expected = run_world(1, bf16_scores, cohort, pipeline), by_hand(cohort, pipeline)
    for one, other in zip(found.peers, expected.peers, strict=True):
        assert one.loss != pytest.approx(other.loss, rel=1e-5)
        assert one.loss == pytest.approx(other.loss, rel=5e-2)


def test_calibration_on_paper() -> None:
    # 0.6 and 0.62 lie in bin (9/15, 10/15] but for 0.6 itself, which ends the one before; 1.0 ends the last.
    p = torch.tensor([[[0.6, 0.4], [0.38, 0.62], [0.62, 0.38], [1.0, 0.0], [0.9, 0.1]]], dtype=torch.float64)
    found = excess(p, torch.tensor([0, 0, 0, 0, -1]))
    expected = torch.zeros(1, 15, dtype=torch.float64)
    expected[0, 8] = 0.6 - 1
    expected[0, 9] = 2 * 0.62 - 1
    torch.testing.assert_close(found, expected)

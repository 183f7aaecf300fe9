"""The best exit of each of L-MCL's peers is scored in any placement as by a loop over single images."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from engine.config import RunConfig
from engine.training.evaluation import score_exits
from tests.engine.stepping import CLASSES, cohort_of, config_of
from tests.engine.training.test_evaluation import IMAGES, Cut
from tests.worlds import run_world

UNLIKE = [{"network": "cifar_resnet8_b", "options": {"width": 4}}, {"network": "cifar_wrn_16_1"}]


@torch.no_grad()
def give_opinions(peer: nn.Module, images: Tensor) -> None:
    """Untrained, but BatchNorm knows these images, and no exit prefers a class for all of them."""
    for module in peer.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.momentum = 1.0
    peer.train()(images)

    def centre(classifier: nn.Module, _: Any, logits: Tensor) -> None:
        assert isinstance(classifier, nn.Linear)
        classifier.bias -= logits.mean(0)

    classifiers = [m for m in peer.modules() if isinstance(m, nn.Linear) and m.out_features == CLASSES]
    hooks = [classifier.register_forward_hook(centre) for classifier in classifiers]
    peer.eval()(images)
    for hook in hooks:
        hook.remove()
    peer.train()


def found(config: RunConfig, pipeline: Any) -> tuple[dict[str, float], dict[str, list[float]]]:
    """What the engine says, and for each resident the percent of images that each of its exits gets right."""
    cohort = cohort_of(config)
    [rows] = pipeline.evaluate(0, 1, IMAGES)
    for resident in cohort.residents.values():
        give_opinions(resident.peer, rows.images)
    scores = score_exits(cohort, pipeline)
    assert all(module.training for resident in cohort.residents.values() for module in resident.peer.modules())
    expected = {}
    for resident in cohort.residents.values():
        peer = resident.peer.eval()
        named = torch.stack([peer(rows.images[i : i + 1])["exits"][0].argmax(-1) for i in range(IMAGES)])
        expected[resident.name] = [100 * int((named[:, s] == rows.targets).sum()) / IMAGES for s in range(3)]
    return scores, expected


@pytest.mark.parametrize(("ranks", "kind"), [(2, "spread"), (3, "colocated")])
def test_the_best_exit_of_each_peer(tiny: Path, ranks: int, kind: str) -> None:
    method = {"name": "lmcl", "width": 8, "negatives": "batch"}
    config = config_of(method, UNLIKE, placement={"kind": kind}, evaluation={"batch": 5})
    results = run_world(ranks, found, config, Cut(tiny))
    exits = {name: of_each for _, expected in results for name, of_each in expected.items()}
    assert len(exits) == 2
    assert all(len(set(of_each)) > 1 for of_each in exits.values())  # or any exit would do for the best
    for scores, _ in results:
        assert scores == {f"val/{name}/best_exit": pytest.approx(max(each)) for name, each in exits.items()}

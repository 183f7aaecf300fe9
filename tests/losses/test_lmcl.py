"""L-MCL's whole objective against float64 loops, its outer problem against an unrolled one, and its exits."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from engine.ranks.tables import make_table
from losses import Progress, Terms
from losses.lmcl import LMCL, LMCLOptions
from losses.mcl import MCL, MCLOptions
from tests.losses.contrastive import (
    FromBatch,
    FromMemory,
    added,
    assert_same,
    assert_shares_add_up,
    gradients,
    leaves,
    lmcl_contrast,
    unit_rows,
)
from tests.losses.double import ce, kd
from tests.losses.peers import peers as alike

N, G, C, D, IMAGES = 5, 7, 4, 5, 30
CLASSES = torch.tensor(np.random.default_rng(0).integers(3, size=IMAGES))
"""Of the training images."""
IDS = torch.tensor([4, 29, 0, 17, 8, 11, 5])
"""Of the global batch; the first N are this rank's."""
Y = CLASSES[IDS[:N]]
PROGRESS = Progress(step=100, steps_per_epoch=100, epochs=3)
Shown = Sequence[Mapping[str, Tensor]]


def lmcl(peers: int, **options: Any) -> LMCL:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        defaults = {"alpha": 0.3, "beta": 0.7, "gamma": 1.1, "lam": 0.9, "width": D}
        if options.get("negatives") == "memory":
            defaults |= {"num_negatives": 5, "positives": 2}
        method = LMCL(LMCLOptions(**defaults | options), alike(peers, C))
        method.prepare(CLASSES, partial(make_table, torch.device("cpu")))
    return method


def drawn(method: LMCL, sizes: Sequence[int]) -> list[dict[str, Tensor]]:
    rng = np.random.default_rng(1)

    def normal(*shape: int) -> Tensor:
        return torch.tensor(2 * rng.normal(size=shape)).float().double()

    more = method.options.negatives == "global"
    return [
        {
            "exits": normal(N, s, C),
            "aggregate": normal(N, C),
            "embeddings": unit_rows(k, N, s, D),
            "match": unit_rows(20 + k, N, s, 6),
        }
        | ({"all_embeddings": unit_rows(50 + k, G, s, D)} if more else {})
        for k, s in enumerate(sizes)
    ]


def with_rows(shown: Shown) -> list[dict[str, Tensor]]:
    rows = {"all_targets": CLASSES[IDS], "all_ids": IDS}
    return [{**peer, **(rows if "all_embeddings" in peer else {"all_ids": IDS})} for peer in shown]


def call(method: LMCL, residents: Sequence[int], shown: Shown) -> Terms:
    return method(residents, with_rows(shown), Y, PROGRESS)


def matching(shown: Shown) -> dict[tuple[int, int], Tensor]:
    """w [S_i, S_j, N] of unit rows `match`."""
    w: dict[tuple[int, int], Tensor] = {}
    for i, a in enumerate(shown):
        for j, b in enumerate(shown):
            if i != j:
                cosines = (a["match"].transpose(0, 1).unsqueeze(1) * b["match"].transpose(0, 1)).sum(-1)
                w[i, j] = 1 / (1 + (-cosines).exp())
    return w


def contrasted(method: LMCL, shown: Shown, w: Mapping[tuple[int, int], Tensor]) -> Terms:
    o, e = method.options, [peer["embeddings"] for peer in shown]
    if o.negatives == "batch":
        return lmcl_contrast(FromBatch(e, e, Y), w, o)
    if o.negatives == "global":
        return lmcl_contrast(FromBatch(e, [peer["all_embeddings"] for peer in shown], CLASSES[IDS]), w, o)
    images = method.memory.images(IDS[:N], Y, PROGRESS.step).tolist()
    banks = [bank.rows.double() for bank in method.memory.banks]
    return lmcl_contrast(FromMemory(e, banks, images, o.positives, o.vcl_bank == "published"), w, o)


def classified(z: Tensor) -> Tensor:
    return sum(ce(z[:, s], Y) for s in range(z.shape[1]))


def reference(method: LMCL, shown: Shown) -> Terms:
    """All terms, with constant weights."""
    t, everyone = method.options.temperature, range(len(shown))
    last, agg = [peer["exits"][:, -1] for peer in shown], [peer["aggregate"] for peer in shown]
    return added(
        {(i, "ce"): classified(shown[i]["exits"]) for i in everyone},
        {(i, "ce_aggregate"): ce(agg[i], Y) for i in everyone},
        {(i, "kd"): sum(kd(last[i], agg[j].detach(), t) for j in everyone) for i in everyone},
        contrasted(method, shown, {pair: x.detach() for pair, x in matching(shown).items()}),
    )


PLACES = [{"negatives": "batch"}, {"negatives": "global"}, {"negatives": "memory"}]
PUBLISHED = {"negatives": "memory", "vcl_bank": "published"}
WORLDS = {2: [[[0], [1]]], 3: [[[0], [1, 2]], [[0], [1], [2]]]}


@pytest.mark.parametrize(
    ("sizes", "options"),
    [((2, 3), PLACES[0]), ((2, 3), PUBLISHED), *(((1, 2, 1), options) for options in (*PLACES, PUBLISHED))],
)
def test_the_objective(sizes: tuple[int, ...], options: dict[str, Any]) -> None:
    """The loss of ordered pairs that the published loop adds up, though half of it comes twice."""
    method = lmcl(len(sizes), **options)
    shown = drawn(method, sizes)
    exact, live = ([dict(zip(p, leaves(list(p.values()), t), strict=True)) for p in shown]
                   for t in (torch.float64, torch.float32))  # fmt: skip
    flat = [[x for peer in each for x in peer.values()] for each in (live, exact)]
    expected = reference(method, exact)
    found = call(method, range(len(sizes)), live)
    assert_same(found, expected, *flat)
    matches = [peer["match"] for peer in live]
    assert not any(g.any() for g in gradients(torch.stack(list(found.values())).sum(), matches))
    assert_shares_add_up(partial(call, method), shown, method.private, expected, exact, WORLDS[len(sizes)])


def test_with_one_exit_and_even_weights_it_is_mcl() -> None:
    """It counts ordered pairs, twice what MCL does, and features at right angles have a weight of 1/2."""
    method = lmcl(2, negatives="batch")
    shown = [{**peer, "logits": peer["exits"][:, 0]} for peer in drawn(method, (1, 1))]
    for peer, axis in zip(shown, (0, 1), strict=True):
        peer["match"] = torch.eye(6, dtype=torch.float64)[axis].expand(N, 1, 6)
    plain = MCL(MCLOptions(alpha=0.3, beta=0.7, gamma=1.1, lam=0.9, negatives="batch", width=D), alike(2, C))
    one, two = call(method, [0, 1], shown), plain([0, 1], shown, Y, PROGRESS)
    for i in (0, 1):
        for name in ("vcl", "soft_vcl", "icl", "soft_icl"):
            assert one[i, name].item() == pytest.approx(two[i, name].item(), rel=1e-10)


@pytest.mark.parametrize(("cosine", "weight"), [(1.0, 0.731058579), (-1.0, 0.268941421), (0.0, 0.5)])
def test_weights_on_paper(cosine: float, weight: float) -> None:
    """All embeddings the same, every image with a class mate: each anchor's loss is ln(N - 1) in each of S S' pairs."""
    method = lmcl(2, negatives="batch", alpha=1.0, beta=1.0)
    shown = drawn(method, (2, 3))
    directions = (1.0, 0.0), (cosine, math.sqrt(1 - cosine**2))
    for peer, direction in zip(shown, directions, strict=True):
        peer["embeddings"] = torch.ones_like(peer["embeddings"]) / math.sqrt(D)
        peer["match"] = torch.tensor(direction).double().expand(*peer["match"].shape[:2], 2)
    y = torch.tensor([0, 1, 0, 1, 1])
    terms = method([0, 1], shown, y, PROGRESS)
    for i in (0, 1):
        assert terms[i, "vcl"].item() == pytest.approx(2 * 6 * weight * math.log(N - 1), rel=1e-8)
        assert terms[i, "icl"].item() == pytest.approx(2 * 6 * weight * math.log(N - 1), rel=1e-8)


@pytest.mark.parametrize("options", PLACES)
def test_what_is_sent(options: dict[str, Any]) -> None:
    method = lmcl(2, **options)
    assert set(method.signals) - set(method.private) == {"aggregate", "embeddings", "match"}
    assert method.everywhere == (() if options["negatives"] == "batch" else ("embeddings",))
    assert method.exchange == ("detached" if options["negatives"] == "memory" else "differentiable")


def test_defaults_are_the_published_scripts() -> None:
    o = LMCLOptions()
    assert (o.alpha, o.beta, o.gamma, o.lam, o.tau, o.temperature) == (0.1, 0.1, 1.0, 1.0, 0.1, 3.0)
    assert (o.width, o.meta_interval, o.inner_steps, o.hypergradient, o.vcl_bank) == (128, 50, 2, "exact", "own")

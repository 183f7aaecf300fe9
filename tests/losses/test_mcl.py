"""MCL's whole objective against float64 loops over pairs of peers and anchors."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from engine.ranks.tables import make_table
from losses import METHODS, Progress, Terms
from losses.capabilities import AfterStep
from losses.mcl import MCL, MCLOptions
from tests.losses.contrastive import (
    FromBatch,
    FromMemory,
    added,
    assert_same,
    assert_shares_add_up,
    leaves,
    mcl_contrast,
    unit_rows,
)
from tests.losses.double import ce, kd
from tests.losses.peers import peers as alike

N, G, C, D, IMAGES = 6, 9, 7, 5, 30
CLASSES = torch.tensor(np.random.default_rng(0).integers(4, size=IMAGES))
"""Of the training images."""
IDS = torch.tensor([4, 29, 0, 17, 8, 11, 5, 23, 9])
"""Of the global batch; the first N are this rank's."""
PROGRESS = Progress(step=13, steps_per_epoch=10, epochs=3)


def mcl(peers: int, **options: Any) -> MCL:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        defaults = {"alpha": 0.3, "beta": 0.7, "gamma": 1.1, "lam": 0.9, "width": D}
        if options.get("negatives") == "memory":
            defaults |= {"num_negatives": 5, "positives": 2}
        method = MCL(MCLOptions(**defaults | options), alike(peers, C))
        method.prepare(CLASSES, partial(make_table, torch.device("cpu")))
    return method


def drawn(method: MCL) -> list[dict[str, Tensor]]:
    rng = np.random.default_rng(1)
    return [
        {"logits": torch.tensor(2 * rng.normal(size=(N, C))).float().double(), "embeddings": unit_rows(k, N, 1, D)}
        | ({"all_embeddings": unit_rows(50 + k, G, 1, D)} if method.options.negatives == "global" else {})
        for k in range(method.num_peers)
    ]


def call(method: MCL, residents: Sequence[int], shown: Sequence[Mapping[str, Tensor]]) -> Terms:
    rows = {"all_targets": CLASSES[IDS], "all_ids": IDS} if method.everywhere else {}
    return method(residents, [{**peer, **rows} for peer in shown], CLASSES[IDS[:N]], PROGRESS)


def reference(method: MCL, shown: Sequence[Mapping[str, Tensor]]) -> Terms:
    o, y, everyone = method.options, CLASSES[IDS[:N]], range(method.num_peers)
    e, z = [peer["embeddings"] for peer in shown], [peer["logits"] for peer in shown]
    if o.negatives == "batch":
        source: FromBatch | FromMemory = FromBatch(e, e, y)
    elif o.negatives == "global":
        source = FromBatch(e, [peer["all_embeddings"] for peer in shown], CLASSES[IDS])
    else:
        images = method.memory.images(IDS[:N], y, PROGRESS.step).tolist()
        source = FromMemory(e, [bank.rows.double() for bank in method.memory.banks], images, o.positives)
    mean = sum(z).detach() / len(z)
    students = {"none": [], "all": everyone, "last": [len(z) - 1]}[o.logit_distill]
    return added(
        {(k, "ce"): ce(z[k], y) for k in everyone},
        mcl_contrast(source, o),
        {(k, "kd"): kd(z[k], mean, o.temperature) for k in students},
    )


PLACES = ["batch", "global", "memory"]
WORLDS = {2: [[[0], [1]]], 3: [[[0], [1, 2]], [[0], [1], [2]], [[2, 0], [1]]]}


@pytest.mark.parametrize(
    ("negatives", "logit_distill"),
    [("batch", "none"), ("batch", "all"), ("batch", "last"), ("global", "none"), ("memory", "none"), ("memory", "all")],
)
@pytest.mark.parametrize("peers", [2, 3])
def test_the_objective(peers: int, negatives: str, logit_distill: str) -> None:
    method = mcl(peers, negatives=negatives, logit_distill=logit_distill)
    shown = drawn(method)
    exact, live = ([dict(zip(p, leaves(list(p.values()), t), strict=True)) for p in shown]
                   for t in (torch.float64, torch.float32))  # fmt: skip
    flat = [[x for peer in each for x in peer.values()] for each in (live, exact)]
    expected = reference(method, exact)
    assert_same(call(method, range(peers), live), expected, *flat)
    assert_shares_add_up(partial(call, method), shown, method.private, expected, exact, WORLDS[peers])


@pytest.mark.parametrize("negatives", PLACES)
def test_what_is_sent(negatives: str) -> None:
    """Logits only where they are distilled; embeddings of the whole global batch where they are contrasted with; and
    gradients unless banks, which are constant, are what anchors are contrasted with."""
    method = mcl(2, negatives=negatives)
    assert method.signals == ("logits", "embeddings")
    assert method.private == ("logits",)
    assert mcl(2, negatives=negatives, logit_distill="last").private == ()
    assert method.everywhere == (() if negatives == "batch" else ("embeddings",))
    assert method.exchange == ("detached" if negatives == "memory" else "differentiable")


@pytest.mark.parametrize("chunk", [1, 4])
@pytest.mark.parametrize("negatives", PLACES)
def test_pieces_change_nothing(negatives: str, chunk: int) -> None:
    shown, found = drawn(mcl(3, negatives=negatives)), []
    for size in (None, chunk):
        live = [dict(zip(p, leaves(list(p.values()), torch.float32), strict=True)) for p in shown]
        terms = call(mcl(3, negatives=negatives, chunk=size), range(3), live)
        total = torch.stack(list(terms.values())).sum()
        gradients = torch.autograd.grad(total, [x for peer in live for x in peer.values()])
        found.append(([x.item() for x in terms.values()], gradients))
    np.testing.assert_allclose(*(values for values, _ in found), rtol=1e-6)
    for a, b in zip(*(gradients for _, gradients in found), strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-6 * b.abs().max().item())


def test_defaults_are_the_published_scripts() -> None:
    o = MCLOptions()
    assert (o.alpha, o.beta, o.gamma, o.lam, o.tau, o.temperature) == (0.1, 0.1, 1.0, 1.0, 0.1, 3.0)
    assert (o.width, o.positives, o.num_negatives, o.bank_momentum, o.logit_distill) == (128, 1, 8192, 0.5, "none")


def test_banks_follow_the_embeddings_of_all_rows_of_a_step() -> None:
    """Of each micro-batch, those of the last exit; not after a step that was skipped. What is drawn next is another."""
    method = mcl(2, negatives="memory", bank_momentum=0.25)
    before = [bank.rows.clone() for bank in method.memory.banks]
    seen = [
        [{"all_embeddings": unit_rows(10 * m + k, 4, 2, D).float(), "all_ids": IDS[4 * m : 4 * m + 4]} for k in (0, 1)]
        for m in (0, 1)
    ]

    def after(skipped: float) -> AfterStep:
        nothing: Any = None
        return AfterStep({}, nothing, nothing, seen, torch.tensor([skipped]), PROGRESS)

    method.after_step(after(1.0))
    assert all(torch.equal(bank.rows, old) for bank, old in zip(method.memory.banks, before, strict=True))
    method.after_step(after(0.0))
    for k, (bank, old) in enumerate(zip(method.memory.banks, before, strict=True)):
        right = old.double()
        for part in seen:
            moved = 0.25 * right[part[k]["all_ids"]] + 0.75 * part[k]["all_embeddings"][:, -1].double()
            right[part[k]["all_ids"]] = moved / moved.norm(dim=1, keepdim=True)
        np.testing.assert_allclose(bank.rows, right, atol=1e-6)
        assert (bank.rows != old).any(1).sum() == 8


def test_draws_change_with_the_step_alone() -> None:
    method = mcl(2, negatives="memory")
    shown = [{name: x.float() for name, x in peer.items()} for peer in drawn(method)]
    rows = {"all_targets": CLASSES[IDS], "all_ids": IDS}
    signals = [{**peer, **rows} for peer in shown]
    y = CLASSES[IDS[:N]]
    a, b, c = (method([0, 1], signals, y, PROGRESS._replace(step=step))[0, "icl"] for step in (13, 13, 14))
    assert a == b
    assert a != c


def test_the_seed_of_a_run_decides_on_the_draws() -> None:
    found = []
    for seed in (0, 0, 1):
        torch.manual_seed(seed)
        method = MCL(MCLOptions(negatives="memory", num_negatives=5), alike(2, C))
        method.prepare(CLASSES, partial(make_table, torch.device("cpu")))
        found.append((method.memory.images(IDS, CLASSES[IDS], 0), method.memory.banks[0].rows))
    for same, other in zip(found[0], found[1], strict=True):
        assert torch.equal(same, other)
    for same, other in zip(found[0], found[2], strict=True):
        assert not torch.equal(same, other)


def test_shared_stages() -> None:
    assert MCL.trunk(MCLOptions(), 3) is None
    assert [MCL.trunk(MCLOptions(shared_stages=s), 4) for s in (1, 2)] == [1, 2]


@pytest.mark.parametrize("name", ["mcl", "lmcl"])
def test_one_peer_is_refused(name: str) -> None:
    with pytest.raises(ValueError, match=rf"^{name} needs at least 2 peers to teach each other, found 1$"):
        METHODS[name].check(METHODS[name].Options(), 1)


@pytest.mark.parametrize("name", ["mcl", "lmcl"])
@pytest.mark.parametrize(
    "options",
    [{"tau": 0.0}, {"chunk": 0}, {"positives": 0}, {"bank_momentum": 1.0}, {"negatives": "queue"}, {"alpha": -0.1}],
)
def test_options_that_mean_nothing_are_refused(name: str, options: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=next(iter(options))):
        METHODS[name].Options(**options)


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"bank_sharded": True}, "bank_sharded = True"),
        ({"negatives": "batch", "num_negatives": 64}, "num_negatives = 64"),
        ({"bank_momentum": 0.9}, "bank_momentum = 0.9"),
    ],
)
def test_options_of_the_banks_are_refused_without_banks(options: dict[str, Any], named: str) -> None:
    with pytest.raises(ValueError, match=rf"{named}: only negatives = memory has memory banks, found negatives = "):
        MCLOptions(**options)
    MCLOptions(**{**options, "negatives": "memory"})
    MCLOptions(**MCLOptions().model_dump())  # what a run wrote can be read again

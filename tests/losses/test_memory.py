"""Memory banks: what is drawn for a batch, what stands in the banks at first, and what a step changes there."""

from __future__ import annotations

from functools import partial
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from data_pipelines.order import part
from engine.ranks.tables import make_table
from losses.contrast import ContrastiveOptions, rows_in_memory, totals
from losses.memory import Memory
from tests.losses.contrastive import FromMemory, added, assert_same, leaves, of_anchors, unit_rows, weights
from tests.worlds import run_world

KEY = 123456789, 4000000000
WIDTH = 128
SIZE = 60
CLASSES = torch.tensor(np.random.default_rng(0).integers(4, size=SIZE)).index_fill_(0, torch.tensor([3, 17, 40]), -1)
IDS = torch.tensor([12, 59, 0, 33, 8])
TARGETS = CLASSES[IDS]
KEEP = torch.zeros(1)


def settings(**changed: Any) -> ContrastiveOptions:
    return ContrastiveOptions(
        **{"name": "mcl", "negatives": "memory", "width": WIDTH, "positives": 2, "num_negatives": 7} | changed
    )


def memory(peers: int = 2, key: tuple[int, int] = KEY, classes: Tensor = CLASSES, **changed: Any) -> Memory:
    return Memory(settings(**changed), peers, classes, partial(make_table, torch.device("cpu")), key)


def banks(of: Memory) -> list[Tensor]:
    return [bank.read(torch.arange(len(of.classes))) for bank in of.banks]


def embeddings(peers: int, ids: Tensor, seed: int = 0) -> list[Tensor]:
    return [unit_rows(seed + k, len(ids), WIDTH).float() for k in range(peers)]


# -- at first ---------------------------------------------------------------------------------------------------------


def test_initial_rows() -> None:
    """U(-s, s) with s = sqrt(3 / d) = 0.1531, so that rows are about as long as embeddings."""
    rows = torch.stack(banks(memory(3, classes=torch.arange(1000) % 4)))
    s = (3 / WIDTH) ** 0.5
    assert 0.999 * s < rows.max() < s
    assert -s <= rows.min() < -0.999 * s
    counts = np.histogram(rows.numpy(), bins=16, range=(-s, s))[0]
    share = rows.numel() / 16
    assert ((counts - share) ** 2 / share).sum() < 15 + 6 * 30**0.5
    assert rows.mean().abs() < 5 * s / (3 * rows.numel()) ** 0.5
    assert (rows.norm(dim=-1).mean() - 1).abs() < 0.01
    # Neighbouring rows, columns and banks have nothing to do with each other.
    for other in (rows.roll(1, 0), rows.roll(1, 1), rows.roll(1, 2)):
        assert ((rows * other).mean() / rows.square().mean()).abs() < 5 / rows.numel() ** 0.5


def test_initial_rows_are_a_function_of_bank_image_and_key() -> None:
    made: list[Any] = []

    def record(size: int, width: int, dtype: torch.dtype, initial: Any, **options: bool) -> torch.nn.Module:
        made.append(initial)
        return make_table(torch.device("cpu"), size, width, dtype, initial, **options)

    whole = banks(Memory(settings(), 2, CLASSES, record, KEY))
    for ids in (IDS, IDS.flip(0), torch.arange(30, 41), torch.tensor([59])):
        for bank, initial in zip(whole, made, strict=True):
            assert torch.equal(initial(ids), bank[ids])
    assert all(torch.equal(a, b) for a, b in zip(whole, banks(memory(2)), strict=True))
    assert not torch.equal(whole[0], whole[1])
    assert not torch.equal(whole[0], banks(memory(2, (KEY[0] + 1, KEY[1])))[0])
    longer = memory(2, classes=torch.cat([CLASSES, CLASSES]))
    assert torch.equal(banks(longer)[1][:SIZE], whole[1])


# -- draws ------------------------------------------------------------------------------------------------------------


def test_images_of_a_batch() -> None:
    found = memory().images(IDS, TARGETS, step=5)
    assert found.shape == (5, 1 + 2 + 7)
    assert torch.equal(found[:, 0], IDS)
    assert (CLASSES[found[:, 1:3]] == TARGETS.unsqueeze(1)).all()
    assert (found[:, 1] != found[:, 2]).all()
    assert (CLASSES[found[:, 3:]] != TARGETS.unsqueeze(1)).all()
    assert (CLASSES[found[:, 3:]] != -1).all()


def test_images_are_a_function_of_image_step_and_key() -> None:
    whole = memory().images(IDS, TARGETS, step=5)
    assert torch.equal(whole, memory().images(IDS, TARGETS, step=5))
    order = torch.tensor([3, 1])
    assert torch.equal(whole[order], memory().images(IDS[order], TARGETS[order], step=5))
    for other in (memory().images(IDS, TARGETS, step=6), memory(key=(1, 2)).images(IDS, TARGETS, step=5)):
        assert (other != whole)[:, 1:].any(1).all()
    same = torch.tensor([i for i, c in enumerate(CLASSES.tolist()) if c == 1])[:4]
    drawn = memory(num_negatives=20).images(same, CLASSES[same], step=5)[:, 3:]
    assert len({tuple(row) for row in drawn.tolist()}) == len(same)


def test_products() -> None:
    m = memory()
    images, live = m.images(IDS, TARGETS, 5), unit_rows(3, 4, 5, WIDTH)
    products = m.products(IDS, TARGETS, 5)
    for bank, rows in enumerate(banks(m)):
        for piece in (slice(0, 5), slice(2, 4)):
            found = products(bank, live[:, piece].float(), piece)
            for s in range(4):
                for place, n in enumerate(range(piece.start, piece.stop)):
                    right = rows[images[n]].double() @ live[s, n]
                    np.testing.assert_allclose(found[s, place], right, atol=1e-6)


@pytest.mark.parametrize("chunk", [None, 2])
def test_shared_negatives(chunk: int | None) -> None:
    """One set of negatives for all rows; those of an anchor's own class are as if they had not been drawn."""
    changed = {"shared_negatives": True, "num_negatives": 12, "chunk": chunk, "alpha": 0.3, "beta": 0.7}
    m, o = memory(**changed), settings(**changed)
    sizes = (2, 1)
    e = [unit_rows(70 + k, len(IDS), s, WIDTH) for k, s in enumerate(sizes)]
    # What was drawn shows in products with the rows of one bank, which all differ.
    products = m.products(IDS, TARGETS, 5)
    every = products(0, torch.eye(WIDTH).unsqueeze(1).expand(-1, len(IDS), -1), slice(0, len(IDS)))
    rows, own = banks(m)[0], m.images(IDS, TARGETS, 5)
    assert own.shape == (5, 3)
    images, drawn = [], set()
    for n in range(len(IDS)):
        columns = [every[:, n, c] for c in range(every.shape[-1])]
        assert torch.equal(torch.stack(columns[:3]), rows[own[n]])
        left = [c for c in columns[3:] if c[0] > -1e3]
        ids = [next(i for i in range(SIZE) if torch.equal(rows[i], c)) for c in left]
        assert 0 < len(ids) < 12
        assert all(CLASSES[i] not in (TARGETS[n], -1) for i in ids)
        images.append([*own[n].tolist(), *ids])
        drawn |= set(ids)
    # An image that some anchor sees is seen by all that are of another class.
    for n, ids in enumerate(images):
        assert {i for i in drawn if CLASSES[i] != TARGETS[n]} == set(ids[3:])

    exact, live = leaves(e, torch.float64), leaves(e, torch.float32)
    w = weights(sizes, len(IDS))
    source = FromMemory(exact, [b.double() for b in banks(m)], images, 2)
    right = added(
        *(of_anchors(source, i, k, 1 - i, z, w[i, 1 - i][k, z], o)
          for i in (0, 1) for k in range(sizes[i]) for z in range(sizes[1 - i]))
    )  # fmt: skip
    rows_of_pairs = rows_in_memory([0, 1], [x.transpose(0, 1) for x in live], m.products(IDS, TARGETS, 5), 2, o)
    assert_same(totals(rows_of_pairs, {pair: x.float() for pair, x in w.items()}, o), right, live, exact)


def test_shared_negatives_change_with_the_step_and_not_with_the_rows() -> None:
    m = memory(shared_negatives=True, num_negatives=12)
    live = unit_rows(0, 1, 1, WIDTH).float()
    other = next(i for i in range(SIZE) if CLASSES[i] == TARGETS[0] and i != IDS[0])

    def seen(image: int, step: int) -> Tensor:
        one = torch.tensor([image])
        return m.products(one, CLASSES[one], step)(0, live, slice(0, 1))[..., 3:]

    assert torch.equal(seen(int(IDS[0]), 5), seen(other, 5))
    assert not torch.equal(seen(int(IDS[0]), 5), seen(int(IDS[0]), 6))


# -- updates ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("mu", [0.0, 0.5, 0.9])
def test_update(mu: float) -> None:
    """m <- normalise(mu m + (1 - mu) e) in the rows of the batch, each peer's in its bank, and no other row changes."""
    m = memory(3, bank_momentum=mu)
    before, e = banks(m), embeddings(3, IDS)
    m.update(IDS, e, KEEP)
    elsewhere = torch.tensor([i for i in range(SIZE) if i not in IDS])
    for old, new, own in zip(before, banks(m), e, strict=True):
        assert torch.equal(new[elsewhere], old[elsewhere])
        moved = mu * old[IDS].double() + (1 - mu) * own.double()
        np.testing.assert_allclose(new[IDS], moved / moved.norm(dim=1, keepdim=True), atol=1e-7)
        np.testing.assert_allclose(new[IDS].norm(dim=1), 1, rtol=1e-6)
        assert not torch.equal(new[IDS], old[IDS])


def test_an_update_leaves_no_graph_and_the_embeddings_alone() -> None:
    m = memory()
    e = leaves([x.double() for x in embeddings(2, IDS)], torch.float32)
    kept = [x.detach().clone() for x in e]
    m.update(IDS, e, KEEP)
    assert not any(bank.requires_grad for bank in banks(m))
    assert all(torch.equal(a, b) for a, b in zip(e, kept, strict=True))


def test_a_skipped_step_changes_nothing() -> None:
    m = memory()
    before = banks(m)
    m.update(IDS, [torch.full_like(x, torch.nan) for x in embeddings(2, IDS)], torch.ones(1))
    assert all(torch.equal(a, b) for a, b in zip(before, banks(m), strict=True))


def test_banks_in_bf16() -> None:
    """Rows are rounded where they are kept; what is read is float32."""
    m, exact = memory(bank_dtype="bf16"), memory()
    for small, large in zip(banks(m), banks(exact), strict=True):
        assert small.dtype == torch.float32
        assert torch.equal(small, large.bfloat16().float())
    before = banks(m)
    e = embeddings(2, IDS)
    m.update(IDS, e, KEEP)
    for old, new, own in zip(before, banks(m), e, strict=True):
        moved = torch.nn.functional.normalize(0.5 * old[IDS] + 0.5 * own, dim=1)
        assert torch.equal(new[IDS], moved.bfloat16().float())
    assert {bank.rows.dtype for bank in m.banks} == {torch.bfloat16}  # type: ignore[attr-defined]


def test_only_the_banks_are_saved() -> None:
    """Apart from what all peers share, see `engine.ranks.tables.parts`."""
    assert not memory(2).state_dict()


def test_classes_that_are_too_small_are_refused() -> None:
    with pytest.raises(ValueError, match=r"^class 2 has 1 training samples, positives = 2 needs as many to draw from$"):
        memory(classes=torch.tensor([0, 0, 0, 1, 1, 2]))


def _sharded() -> tuple[list[Tensor], Tensor, list[Tensor]]:
    """On each rank other rows are looked at, and the same are written."""
    m, rank = memory(bank_sharded=True), dist.get_rank()
    mine = part(len(IDS), rank, dist.get_world_size())
    ids, targets = IDS[mine.start : mine.stop], TARGETS[mine.start : mine.stop]
    live = unit_rows(3, 4, 5, WIDTH).float()[:, mine.start : mine.stop]
    m.update(IDS, embeddings(2, IDS), KEEP)
    seen = m.products(ids, targets, 5)(1, live, slice(0, len(ids)))
    return banks(m), seen, [bank.rows for bank in m.banks]  # type: ignore[attr-defined]


def test_sharded_banks_hold_the_same() -> None:
    whole = memory()
    whole.update(IDS, embeddings(2, IDS), KEEP)
    products = whole.products(IDS, TARGETS, 5)(1, unit_rows(3, 4, 5, WIDTH).float(), slice(0, 5))
    ranks = run_world(3, _sharded)
    for read, _, _ in ranks:
        assert all(torch.equal(a, b) for a, b in zip(read, banks(whole), strict=True))
    assert torch.equal(torch.cat([seen for _, seen, _ in ranks], 1), products)
    for k, bank in enumerate(banks(whole)):
        assert [len(own[k]) for _, _, own in ranks] == [20, 20, 20]
        assert torch.equal(torch.cat([own[k] for _, _, own in ranks]), bank)

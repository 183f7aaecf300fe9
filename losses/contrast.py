r"""Contrastive learning between peers: the arithmetic that MCL and L-MCL share.

Every peer i shows S_i embeddings of each image, rows of unit length. An *anchor* is one embedding of one image; its
contrastive logits are its products with other embeddings, over tau. All four losses are sums over ordered pairs (i, j)
of peers, over their embeddings s of i and z of j and over the anchors n of peer i, of `PairRows`, each weighted:

    VCL      h(Z_{i,s})             peer i's anchors among its own embeddings
    SoftVCL  T^2 KL(softmax(Z_{j,z} / T) || softmax(Z_{i,s} / T))       the teacher constant
    ICL      h(Z_{i,s;j,z})         peer i's anchors among the embeddings of peer j
    SoftICL  T^2 KL(softmax(Z_{j,z;i,s} / T) || softmax(Z_{i,s;j,z} / T))   the teacher constant

    h(Z)_n = -1/|P_n| \sum_{g in P_n} ( Z_{n,g} - log \sum_g' exp Z_{n,g'} )        P_n: the positives of anchor n

so that each peer's anchors make up its share of the objective. Everything keeps the dtype of the embeddings, float32 in
training.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from pydantic import Field, model_validator
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from losses.contract import MethodOptions

Pair = tuple[int, int]


class ContrastiveOptions(MethodOptions):
    """Options that `mcl` and `lmcl` share."""

    alpha: float = Field(0.1, ge=0, description="weight of VCL, contrast within a peer")
    beta: float = Field(0.1, ge=0, description="weight of ICL, contrast between peers")
    gamma: float = Field(1.0, ge=0, description="weight of SoftVCL, the KL between the peers' VCL distributions")
    lam: float = Field(1.0, ge=0, description="lambda, weight of SoftICL, the KL between the ICL distributions")
    tau: float = Field(0.1, gt=0, description="temperature of contrastive logits; the papers take 0.07 on ImageNet")
    temperature: float = Field(3.0, gt=0, description="T of all distillation terms, which are multiplied by T^2")
    width: int = Field(128, ge=1, description="d, width of an embedding")
    negatives: Literal["batch", "global", "memory"] = Field(
        "global",
        description="what anchors are contrasted with: the rows of their rank, those of the global batch, or a memory "
        "bank of each peer (the papers' ImageNet form)",
    )
    chunk: int | None = Field(
        None, ge=1, description="anchors at a time, computed again in the backward pass: bounds the memory; null: all"
    )
    positives: int = Field(1, ge=1, description="memory: class mates drawn for each image, beside the image itself")
    num_negatives: int = Field(8192, ge=1, description="memory: images of other classes drawn for each image")
    shared_negatives: bool = Field(
        False,
        description="memory: draw one set of negatives for a rank's rows instead of one for each image, a plain matrix "
        "product; images of the anchor's class are masked. Not in the papers",
    )
    bank_momentum: float = Field(0.5, ge=0, lt=1, description="memory: how much of its old row an image keeps")
    bank_dtype: Literal["float32", "bf16"] = Field("float32", description="memory: number format of the banks")
    bank_sharded: bool = Field(
        False, description="memory: each rank keeps a part of every bank, and asks the others for the rest"
    )

    @model_validator(mode="after")
    def _memory_belongs_to_memory(self) -> ContrastiveOptions:
        for name, field in type(self).model_fields.items():
            value = getattr(self, name)
            if self.negatives != "memory" and name in self.memory_only and value != field.default:
                raise ValueError(
                    f"{name} = {value!r}: only negatives = memory has memory banks, found negatives = {self.negatives}"
                )
        return self

    memory_only: ClassVar[frozenset[str]] = frozenset(
        {"positives", "num_negatives", "shared_negatives", "bank_momentum", "bank_dtype", "bank_sharded"}
    )


@dataclass(frozen=True)
class PairRows:
    """What peer i's anchors contribute against peer j, before weights and means: each [S_i, S_j, N], or [S_i, 1, N]
    where it is the same for all embeddings of j."""

    vcl: Tensor
    soft_vcl: Tensor
    icl: Tensor
    soft_icl: Tensor


def weighted(rows: PairRows, w: Tensor | None, options: ContrastiveOptions, vcl_counts: float = 1.0) -> list[Tensor]:
    """[alpha VCL, gamma SoftVCL, beta ICL, lambda SoftICL] of one ordered pair: sums over embeddings, means over rows.

    Args:
        rows: of the pair.
        w: weights [S_i, S_j, N] of the pairs of embeddings of each row; None: 1, where peers have one embedding each.
        options: of the method.
        vcl_counts: what VCL is multiplied by, which a peer has once and each pair shows anew.
    """
    factors = options.alpha * vcl_counts, options.gamma, options.beta, options.lam
    terms = []
    for factor, x in zip(factors, (rows.vcl, rows.soft_vcl, rows.icl, rows.soft_icl), strict=True):
        x = x if w is None else x * w
        terms.append(factor * x.sum((0, 1)).mean())
    return terms


def in_pieces(chunk: int | None, n: int, compute: Callable[[slice], dict[Pair, PairRows]]) -> dict[Pair, PairRows]:
    """`compute` on all N anchors at once, or on `chunk` of them at a time, each computed again in the backward pass."""
    if chunk is None or chunk >= n:
        return compute(slice(0, n))
    pieces: list[dict[Pair, PairRows]] = [
        checkpoint(compute, slice(begin, min(begin + chunk, n)), use_reentrant=False, preserve_rng_state=False)
        for begin in range(0, n, chunk)
    ]
    return {
        pair: PairRows(*(torch.cat(parts, -1) for parts in zip(*(vars(p[pair]).values() for p in pieces), strict=True)))
        for pair in pieces[0]
    }


# -- negatives from the batch -----------------------------------------------------------------------------------------


def contrast(logits: Tensor, classes: Tensor, first: int = 0) -> Tensor:
    """h(Z) of each anchor, 0 where no other candidate is of its class.

    Args:
        logits: Z [..., N, G]; the candidate in column first + n is the anchor n itself, or its image as another peer
            sees it, and neither a positive nor in the denominator.
        classes: int64 [G] of the candidates.
        first: the column of the first anchor.

    Returns:
        [..., N].
    """
    n, g = logits.shape[-2:]
    itself = torch.arange(first, first + n, device=logits.device).unsqueeze(1) == torch.arange(g, device=logits.device)
    positive = (classes[first : first + n, None] == classes) & ~itself
    count = positive.sum(1)
    # Not -inf: where nothing is left, the result must stay a number to be multiplied by 0.
    log_total = logits.masked_fill(itself, torch.finfo(logits.dtype).min).logsumexp(-1)
    of_positives = (logits * positive).sum(-1) / count.clamp(min=1)
    return torch.where(count > 0, log_total - of_positives, 0.0)


def rows_in_batch(
    residents: Sequence[int],
    anchors: Sequence[Tensor],
    candidates: Sequence[Tensor],
    classes: Tensor,
    options: ContrastiveOptions,
) -> dict[Pair, PairRows]:
    """The pair rows of the residents' anchors, each similarity matrix computed once.

    Args:
        residents: the peers whose anchors count.
        anchors: [S_k, N, d] of every peer k.
        candidates: [S_k, G, d] of every peer; the first N rows are the anchors' own.
        classes: int64 [G] of the candidates.
        options: tau, temperature and chunk.

    Returns:
        (i, j) -> rows for each resident i and each other peer j.
    """
    symmetric = all(a.shape == c.shape for a, c in zip(anchors, candidates, strict=True)) and options.chunk is None

    def compute(rows: slice) -> dict[Pair, PairRows]:
        within: dict[int, Tensor] = {}
        between: dict[Pair, Tensor] = {}
        for i in range(len(anchors)):
            with torch.set_grad_enabled(torch.is_grad_enabled() and i in residents):
                within[i] = torch.bmm(anchors[i][:, rows], candidates[i].mT) / options.tau
            for j in range(len(anchors)):
                if i == j or not {i, j} & set(residents):
                    continue
                with torch.set_grad_enabled(torch.is_grad_enabled() and i in residents):
                    if symmetric and (j, i) in between and j in residents:
                        between[i, j] = between[j, i].permute(1, 0, 3, 2)
                    else:
                        between[i, j] = _products(anchors[i][:, rows], candidates[j]) / options.tau
        h = {i: contrast(within[i], classes, rows.start) for i in residents}
        soft = {i: (z / options.temperature).log_softmax(-1) for i, z in within.items()}
        soft_between = {pair: (z / options.temperature).log_softmax(-1) for pair, z in between.items()}
        found: dict[Pair, PairRows] = {}
        for i in residents:
            for j in range(len(anchors)):
                if i != j:
                    teacher = soft_between[j, i].detach().transpose(0, 1)
                    found[i, j] = PairRows(
                        vcl=h[i].unsqueeze(1),
                        soft_vcl=options.temperature**2 * kl_of_all(soft[j].detach(), soft[i]),
                        icl=contrast(between[i, j], classes, rows.start),
                        soft_icl=options.temperature**2 * (teacher.exp() * (teacher - soft_between[i, j])).sum(-1),
                    )
        return found

    return in_pieces(options.chunk, anchors[0].shape[1], compute)


def _products(a: Tensor, c: Tensor) -> Tensor:
    """[S, N, d], [Z, G, d] -> [S, Z, N, G], by one matrix product."""
    products = a.flatten(0, 1) @ c.flatten(0, 1).T
    return products.view(*a.shape[:2], *c.shape[:2]).transpose(1, 2)


def kl_of_all(log_teachers: Tensor, log_students: Tensor) -> Tensor:
    """KL(q || p) of each teacher with each student, row by row, by one batched product.

    Args:
        log_teachers: log q [Z, N, G].
        log_students: log p [S, N, G].

    Returns:
        [S, Z, N].
    """
    q = log_teachers.exp()
    # What all have in common is taken away first: the difference of two large numbers would leave few digits of a KL.
    common = log_students.detach().mean(0)
    negentropy = (q * (log_teachers - common)).sum(-1)
    cross = torch.bmm((log_students - common).transpose(0, 1), q.permute(1, 2, 0)).permute(1, 2, 0)
    return negentropy - cross


# -- negatives from memory --------------------------------------------------------------------------------------------


def rows_in_memory(
    residents: Sequence[int],
    embeddings: Sequence[Tensor],
    products: Callable[[int, Tensor, slice], Tensor],
    positives: int,
    options: ContrastiveOptions,
    *,
    own_bank: bool = True,
) -> dict[Pair, PairRows]:
    r"""The pair rows of the residents' embeddings against memory banks, one gather and one batched product a bank.

    The images of a row are its own, P class mates and Q others. Peer i's embeddings among bank j, all columns, make
    ICL: the positives are the own image and the mates. Among bank i, without the own image, they make VCL: the
    positives are the mates. The teacher of SoftICL is peer j's embedding among bank i.

    Args:
        residents: the peers whose embeddings count.
        embeddings: [S_k, N, d] of every peer k.
        products: (bank j, [M, N, d], rows) -> [M, N, 1 + P + Q], each embedding of these rows with the bank's rows of
            its images, those of the own image first, then the mates'.
        positives: P.
        options: tau, temperature and chunk.
        own_bank: whether VCL takes each peer's own bank; False, as in L-MCL's published code: a pair is visited in both
            orders, and in each visit both peers are contrasted with the bank of the first. The rows are then the means
            of the two visits.

    Returns:
        (i, j) -> rows for each resident i and each other peer j.
    """
    sizes = [len(x) for x in embeddings]

    def compute(rows: slice) -> dict[Pair, PairRows]:
        live = torch.cat([x[:, rows] if k in residents else x[:, rows].detach() for k, x in enumerate(embeddings)])
        # (i, j): peer i's embeddings among bank j, [S_i, N, 1 + P + Q].
        logits: dict[Pair, Tensor] = {}
        for j in range(len(sizes)):
            for i, piece in enumerate((products(j, live, rows) / options.tau).split(sizes)):
                logits[i, j] = piece
        soft = {pair: (z / options.temperature).log_softmax(-1) for pair, z in logits.items()}
        banks = range(len(sizes))
        within = [(i, j) for i in banks for j in banks if i == j or not own_bank]
        soft_mates = {pair: (logits[pair][..., 1:] / options.temperature).log_softmax(-1) for pair in within}

        def h(pair: Pair, begin: int) -> Tensor:
            z = logits[pair][..., begin:]
            return (z.logsumexp(-1) - z[..., : 1 - begin + positives].mean(-1)).unsqueeze(1)

        found: dict[Pair, PairRows] = {}
        for i in residents:
            for j in banks:
                if i == j:
                    continue
                # (student's bank, teacher's bank) of each visit.
                visits = [(i, j)] if own_bank else [(i, i), (j, j)]
                kl = [kl_of_all(soft_mates[j, there].detach(), soft_mates[i, here]) for here, there in visits]
                found[i, j] = PairRows(
                    vcl=torch.stack([h((i, here), 1) for here, _ in visits]).mean(0),
                    soft_vcl=options.temperature**2 * torch.stack(kl).mean(0),
                    icl=h((i, j), 0),
                    soft_icl=options.temperature**2 * kl_of_all(soft[j, i].detach(), soft[i, j]),
                )
        return found

    return in_pieces(options.chunk, embeddings[0].shape[1], compute)


def totals(
    rows: Mapping[Pair, PairRows], weights: Mapping[Pair, Tensor], options: ContrastiveOptions, **counts: float
) -> dict[tuple[int | None, str], Tensor]:
    """(i, name of the loss) -> the weighted sum over all other peers j, see `weighted`."""
    terms: dict[tuple[int | None, str], Tensor] = {}
    for (i, j), pair in rows.items():
        values = weighted(pair, weights.get((i, j)), options, **counts)
        for name, value in zip(("vcl", "soft_vcl", "icl", "soft_icl"), values, strict=True):
            terms[i, name] = terms[i, name] + value if (i, name) in terms else value
    return terms

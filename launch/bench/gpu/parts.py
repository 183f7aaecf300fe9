"""The parts of what a GPU has to show."""

from __future__ import annotations

from dataclasses import dataclass, field

_SHARED_NCCL = {"NCCL_MULTI_RANK_GPU_ENABLE": "1", "NCCL_NVLS_ENABLE": "0", "NCCL_MAX_CTAS": "4"}


@dataclass(frozen=True)
class Part:
    """One thing to show."""

    title: str
    function: str
    """Where it is: MODULE.FUNCTION of this room, which takes a `Bench`."""
    seconds: float
    """How long it may take."""
    ranks: int = 1
    environment: dict[str, str] = field(default_factory=dict)


PARTS = {
    "ceilings": Part("what the card can do", "ceilings.ceilings", 40),
    "resnet50": Part("ResNet-50, 224 px, bf16, against a bare loop", "networks.resnet50_eager", 90),
    "resnet50-compiled": Part("the same, both compiled", "networks.resnet50_compiled", 170),
    "resnet32": Part("two, four and eight ResNet-32, 32 px", "networks.resnet32", 70),
    "methods": Part("a step of every method over one of independent peers", "methods.methods", 90),
    "lmcl": Part("L-MCL's objective with large banks, and its outer step", "contrastive.lmcl", 50),
    "exchange-gloo": Part("two ranks on one card, gloo", "ranks.exchange", 45, ranks=2),
    "exchange-nccl": Part("two ranks on one card, NCCL", "ranks.exchange_nccl", 45, 2, _SHARED_NCCL),
    "saving": Part("what a save holds up", "disk.saving", 40),
    "decoding": Part("JPEGs decoded by DALI, alone and under training", "disk.decoding", 75),
    "host": Part("operations and host time of a step", "methods.host", 30),
}
"""In the order in which they run, the most important first."""

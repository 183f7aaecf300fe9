"""GPUs as their makers describe them, and how much of that has been seen to be had."""

from __future__ import annotations

import difflib
from dataclasses import dataclass


@dataclass(frozen=True)
class Gpu:
    """One GPU and its links, in units of 1 a second or bytes."""

    name: str
    half: float
    """Multiply-adds count two: dense products of bf16 (of fp16 on a V100) with float32 sums, and"""
    tf32: float
    float32: float
    memory: float
    bandwidth: float
    """Of its memory, in bytes a second."""
    inside: float
    """To the other GPUs of its node, one way: NVLink, or PCIe where there is none."""
    between: float
    """To other nodes, one way: the network card of each GPU."""


GPUS = {
    gpu.name: gpu
    for gpu in (
        Gpu("v100", 125e12, 15.7e12, 15.7e12, 32e9, 0.9e12, 150e9, 12.5e9),
        Gpu("a100-40gb", 312e12, 156e12, 19.5e12, 40e9, 1.555e12, 300e9, 25e9),
        Gpu("a100", 312e12, 156e12, 19.5e12, 80e9, 2.039e12, 300e9, 25e9),
        Gpu("l40s", 362e12, 183e12, 91.6e12, 48e9, 0.864e12, 32e9, 25e9),
        Gpu("rtx4090", 165e12, 82.6e12, 82.6e12, 24e9, 1.008e12, 32e9, 12.5e9),
        Gpu("h100", 989e12, 494e12, 67e12, 80e9, 3.35e12, 450e9, 50e9),
        Gpu("h200", 989e12, 494e12, 67e12, 141e9, 4.8e12, 450e9, 50e9),
        Gpu("b200", 2250e12, 1125e12, 75e12, 180e9, 7.7e12, 900e9, 50e9),
    )
}
"""NVIDIA's data sheets: V100 (SXM2), A100 (SXM4), L40S, GeForce RTX 4090 (its Ada whitepaper), H100 and H200 (SXM5),
HGX B200; rates of dense products, without sparsity. For each GPU a network card of 100 Gb/s (V100, RTX 4090), 200
(A100, L40S) or 400 (H100 and later), as in the makers' servers of the time."""

PRODUCTS = 0.69
"""Of a GPU's rate of products: 679 of 989 TFLOP/s on an H200, bf16, 8192 x 8192 (docs/gpu.md)."""

COPIES = 0.89
"""Of its memory's bandwidth: 4.29 of 4.8 TB/s on the same card, read and written."""

LINKS = 0.8
"""Of a link's bandwidth, by a collective of megabytes. Assumed: NCCL between ranks has not been measured here."""

LATENCY = {"inside": 20e-6, "between": 50e-6}
"""Seconds that a collective takes however little it brings. Assumed."""

MESSAGE = 2e-6
"""Seconds that each message of an all-to-all takes a rank beyond its bytes. Assumed."""

KERNELS = 1.94
"""What a step takes over the sum of its operations at these rates: ResNet-50, bf16, 256 images on an H200, for which
the sum is 28.0 ms and 54.3 were measured (docs/gpu.md). The only point at which this is calibrated."""

COMPILED = 0.71
"""Of that where networks are compiled: 4,711 to 6,593 images/s of the same (docs/gpu.md)."""

DISPATCH = 32e-6
"""Seconds of the host for an operation: two ResNet-32, of 295 each as counted here, took 19.1 ms (docs/gpu.md)."""

DECODED = 6530.0
"""Images a second that DALI decodes with a GPU's help, 8 threads, on an H200 alone, 500 x 375 (docs/gpu.md)."""

DECODED_ON_CPU = 2504.0
"""The same without, by 8 threads (docs/gpu.md)."""

BUCKET = 25 * 2**20
"""Bytes of gradients that DDP sends at a time; those of the last bucket are never sent while something is computed."""

OVERLAPPED = 0.9
"""Of the pass backward during which gradients can be on their way. Assumed."""


def gpu_of(name: str) -> Gpu:
    """A GPU by its name. Raises: ConfigError, with the nearest that is known."""
    if name not in GPUS:
        # The table itself is read by `--help`, for which torch need not be imported.
        from engine.config import ConfigError

        near = difflib.get_close_matches(name.lower(), GPUS, n=1)
        hint = f"; did you mean {near[0]!r}?" if near else ""
        raise ConfigError(f"--gpu {name}: not in the table; expected one of {', '.join(GPUS)}{hint}")
    return GPUS[name]

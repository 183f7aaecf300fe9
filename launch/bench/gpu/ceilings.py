"""What the card can do at best: copying and multiplying."""

from __future__ import annotations

import os
import platform
import statistics

import torch

from launch.bench.gpu.bench import Bench
from launch.bench.turns import timed


def ceilings(bench: Bench) -> None:
    """Copies within the device's memory, and a product of bf16 matrices."""
    cuda = bench.device.type == "cuda"
    bench.row(
        "machine",
        cores=os.cpu_count() or 0,
        python=platform.python_version(),
        cuda=str(torch.version.cuda) if cuda else "none",
        cudnn=str(torch.backends.cudnn.version()) if cuda else "none",
        nccl=".".join(map(str, torch.cuda.nccl.version())) if cuda else "none",
    )
    numbers = 1 << (20 if bench.quick else 30)
    source = torch.zeros(numbers, dtype=torch.bfloat16, device=bench.device)
    target = torch.empty_like(source)
    seconds = _median(bench, lambda: target.copy_(source))
    bench.row("copy on the device, read and written", value=2 * 2 * numbers / seconds / 1e9, unit="GB/s")

    side = 256 if bench.quick else 8192
    a, b = (torch.randn(side, side, device=bench.device, dtype=torch.bfloat16) for _ in range(2))
    seconds = _median(bench, lambda: a @ b)
    bench.row(f"bf16 matrix product of {side} x {side}", value=2 * side**3 / seconds / 1e12, unit="TFLOP/s")


def _median(bench: Bench, operation: object) -> float:
    assert callable(operation)
    rounds = [timed(operation, 20, bench.device) / 20 for _ in range(3 if bench.quick else 12)]
    return statistics.median(rounds[2:])

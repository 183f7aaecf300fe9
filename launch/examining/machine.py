"""What there is of a machine: cores, memory, GPUs, libraries, clocks."""

from __future__ import annotations

import os
import shutil
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch
import torch.distributed as dist

from data_pipelines.decoding.choice import choose
from engine.config import RunConfig

_GIB = 2**30
_FEW_CORES = 8
"""Cores a GPU below which decoding on the CPU usually keeps a GPU waiting."""
_APART = 1.0
"""Seconds that the clocks of nodes may differ: owners of run folders tell by them who is alive."""


def machine(config: RunConfig, device: torch.device) -> Iterator[str]:
    """Lines about this machine, and what is to be said of them for a run."""
    cores, gpus = len(os.sched_getaffinity(0)), torch.cuda.device_count()
    names = ", ".join(sorted({torch.cuda.get_device_name(i) for i in range(gpus)})) or "no GPU"
    yield f"cores: {cores}; GPUs: {gpus} ({names})" if gpus else f"cores: {cores}; no GPU"
    if gpus and cores / gpus < _FEW_CORES and config.data.photos:
        yield (
            f"  {cores / gpus:.1f} cores a GPU is little for decoding; decoding.decoder = mixed decodes on the GPU, "
            "smaller photos (launch/shard.py --shorter-side) take less"
        )
    yield f"memory: {_available() / _GIB:.1f} GiB to be had; shared memory: {_free('/dev/shm')}"
    yield f"disk of the run's folder: {_free(config.folder)}"
    nccl = ".".join(map(str, torch.cuda.nccl.version())) if torch.cuda.is_available() else "none, gloo on CPUs"
    yield f"torch {torch.__version__}, CUDA {torch.version.cuda or 'none'}, NCCL {nccl}"
    if config.data.photos:
        yield f"decoder: {choose(config.data.decoding.decoder, cuda=device.type == 'cuda')}"


def clocks() -> Iterator[str]:
    """How far the clocks of all ranks' machines are apart, within a world. Every rank must call it."""
    if dist.get_world_size() == 1:
        return
    dist.barrier()
    found: list[float] = [0.0] * dist.get_world_size()
    dist.all_gather_object(found, time.time())
    apart = max(found) - min(found)
    yield f"clocks of {len(found)} ranks: at most {apart:.2f} s apart"
    if apart > _APART:
        yield f"  more than {_APART:.0f} s: let NTP keep the time of all nodes; who owns a run's folder is told by it"


def _available() -> int:
    for line in Path("/proc/meminfo").read_text().splitlines():
        if line.startswith("MemAvailable"):
            return int(line.split()[1]) * 1024
    return 0


def _free(path: str | Path) -> str:
    """Of the file system that a path lies on, or will lie on."""
    there: Sequence[Path] = [Path(path).absolute(), *Path(path).absolute().parents]
    for each in there:
        if each.exists():
            return f"{shutil.disk_usage(each).free / _GIB:.1f} GiB free"
    return "none"

"""The process group and the few collectives we use, under the names of torch 2.11 to 2.15."""

from __future__ import annotations

import contextlib
import hashlib
import os
import sys
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import distributed_c10d as c10d

from engine.config import ConfigError
from engine.ranks.gathering import gather

FIRST_STEP_TIMEOUT = timedelta(minutes=30)
"""Compilation, cuDNN's search and a cold file system all fall before the end of the first step."""

LEAVE_TIMEOUT = 10.0
"""Seconds that a rank that has failed takes to leave the others in good order."""


@dataclass(frozen=True)
class Launch:
    """What torchrun told this process; a process started alone is rank 0 of 1."""

    rank: int
    local_rank: int
    world: int
    per_node: int | None = None
    """Ranks of this machine, where that is known."""

    @classmethod
    def from_environment(cls) -> Launch:
        """Reads RANK, LOCAL_RANK, WORLD_SIZE and LOCAL_WORLD_SIZE."""
        rank, local_rank, world, per_node = (
            int(os.environ.get(name, otherwise))
            for name, otherwise in (("RANK", 0), ("LOCAL_RANK", 0), ("WORLD_SIZE", 1), ("LOCAL_WORLD_SIZE", 0))
        )
        return cls(rank, local_rank, world, per_node or None)


def choose_device(wanted: str, launch: Launch) -> torch.device:
    """The device of this rank. Touches no device but to count them.

    Raises:
        ConfigError: cuda is asked for and absent.
    """
    count = torch.cuda.device_count() if wanted != "cpu" else 0
    if wanted == "cuda" and not count:
        raise ConfigError("device = cuda: this machine has no CUDA device; expected cpu or auto here")
    return torch.device("cuda", launch.local_rank % count) if count else torch.device("cpu")


def start(launch: Launch, device: torch.device, asked: Callable[[], int] = lambda: 0) -> str:
    """Joins the process group: gloo for CPU tensors, NCCL for CUDA tensors where each rank has a GPU of its own.

    Args:
        asked: the number of a signal that asks for the end, 0 without.

    Returns:
        A word that all ranks of this start have in common, and no other start.

    Raises:
        StoppedEarly, TimeoutError: see `gather`.
    """
    word, store = "", dist.HashStore()  # type: ignore[attr-defined]
    if "RANK" in os.environ:
        word, store = gather(launch.rank, launch.world, asked)
    else:
        # Or a process alone would listen where its machine's name leads to, and be heard on a network.
        os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    backend = "gloo"
    if device.type == "cuda":
        torch.cuda.set_device(device)
        backend = "cpu:gloo,cuda:nccl"
        gpu = str(torch.cuda.get_device_properties(device).uuid)
        # A new NCCL may be told to take two ranks on one GPU.
        if os.environ.get("NCCL_MULTI_RANK_GPU_ENABLE") != "1" and is_shared(gpu, store, launch.world):
            backend = "gloo"
            if launch.rank == 0:
                print(
                    "warning: some ranks share a GPU, which NCCL refuses: all communicate over gloo, which is slower; "
                    "start as many ranks on a machine as it has GPUs",
                    file=sys.stderr,
                    flush=True,
                )
    _LEFT.clear()
    dist.init_process_group(backend, store=store, rank=launch.rank, world_size=launch.world, timeout=FIRST_STEP_TIMEOUT)
    return word


def is_shared(gpu: str, store: Any, world: int) -> bool:
    """Whether any two ranks of the world compute on one GPU: the same answer on all ranks, which all ask.

    How many GPUs a rank sees says nothing of it: schedulers often show each rank a single one, its own.

    Args:
        gpu: what tells this rank's GPU from all others.
        store: that the world meets in.
        world: number of ranks.
    """
    if store.add(f"gpu/{gpu}", 1) > 1:
        store.add("gpus_shared", 1)
    if store.add("gpus_told", 1) == world:
        store.set("gpus_all_told", "1")
    store.wait(["gpus_all_told"], FIRST_STEP_TIMEOUT)
    return bool(store.add("gpus_shared", 0))


@contextlib.contextmanager
def process_group(launch: Launch, device: torch.device, asked: Callable[[], int]) -> Iterator[str]:
    """As `start`, and leaves the process group at the end, whatever that is."""
    word = start(launch, device, asked)
    try:
        yield word
    except BaseException:
        # Ranks that have not failed may wait in a collective for ever, and this one for them.
        leaving = threading.Thread(target=dist.destroy_process_group, daemon=True)
        leaving.start()
        leaving.join(LEAVE_TIMEOUT)
        raise
    else:
        dist.destroy_process_group()


def group_of(ranks: Iterable[int]) -> dist.ProcessGroup:
    """The group of some ranks of the world. They alone call this, so that it takes as long in a large world as in a
    small one; a rank of several groups makes them in the same order as the others."""
    with _named_anew():
        group = dist.new_group(list(ranks), timeout=FIRST_STEP_TIMEOUT, use_local_synchronization=True)
    assert isinstance(group, dist.ProcessGroup)
    return group


_LEFT: set[str] = set()
"""Names of groups of this world that have been left: the same for all that were in them."""


@contextlib.contextmanager
def _named_anew() -> Iterator[None]:
    """Up to torch 2.11 a group has the name of one of the same ranks that was left. Under that the store still tells
    where those were, and they would look for each other there for ever."""
    torchs = c10d._hash_ranks_to_str

    def name_of(ranks: Sequence[int]) -> str:
        name = torchs(ranks)
        while name in _LEFT:
            name = hashlib.sha1(name.encode(), usedforsecurity=False).hexdigest()
        return name

    c10d._hash_ranks_to_str = name_of
    try:
        yield
    finally:
        c10d._hash_ranks_to_str = torchs


def leave(group: dist.ProcessGroup) -> None:
    """Frees what a group holds: connections, threads, memory of a GPU. Nothing of it may be under way."""
    if group in c10d._world.pg_map:  # the world may have been left before
        _LEFT.add(group.group_name)
        dist.destroy_process_group(group)


def limit_waiting(seconds: float) -> None:
    """From now on a collective of any group fails if it takes longer. To be called by all ranks together.

    All groups that this rank is in so far are meant; a later one has a limit of its own.
    """
    dist.barrier()
    for group in list(dist.distributed_c10d._world.pg_map):
        if hasattr(dist, "set_timeout"):
            dist.set_timeout(timedelta(seconds=seconds), group)
        else:  # before torch 2.13
            dist.distributed_c10d._set_pg_timeout(timedelta(seconds=seconds), group)


def record_flights(folder: Path) -> None:
    """Has NCCL write its last collectives into a folder if one of them times out; `torchfrtrace FOLDER` reads them.

    To be called before the process group exists. What the user has set stays.
    """
    folder.mkdir(parents=True, exist_ok=True)
    os.environ.setdefault("TORCH_FR_BUFFER_SIZE", "20000")
    os.environ.setdefault("TORCH_FR_DUMP_TEMP_FILE", str(folder.absolute() / "rank_"))
    os.environ.setdefault("TORCH_NCCL_DUMP_ON_TIMEOUT", "1")


GatherObjects = Callable[[Any, dist.ProcessGroup], list[Any]]
"""An object of every rank of a group -> all of them, in the order of ranks."""


def gather_objects(mine: Any, group: dist.ProcessGroup) -> list[Any]:
    """What every rank of the group has, on all of them; slow, and the host waits."""
    found: list[Any] = [None] * group.size()
    dist.all_gather_object(found, mine, group=group)
    return found


def all_gather(tensor: Tensor, group: dist.ProcessGroup) -> Tensor:
    """Flat [S] of every rank of the group -> [P, S], without gradient. One collective."""
    gathered = tensor.new_empty(group.size() * tensor.numel())
    if hasattr(dist, "all_gather_single"):
        dist.all_gather_single(gathered, tensor, group=group)
    else:
        dist.all_gather_into_tensor(gathered, tensor, group=group)
    return gathered.view(group.size(), -1)


def reduce_scatter(tensor: Tensor, group: dist.ProcessGroup) -> Tensor:
    """[P, S] of every rank of the group -> for each rank the sum of its slices, flat [S]. One collective."""
    own = tensor.new_empty(tensor.shape[1])
    if hasattr(dist, "reduce_scatter_single"):
        dist.reduce_scatter_single(own, tensor.contiguous().view(-1), group=group)
    else:
        dist.reduce_scatter_tensor(own, tensor.contiguous().view(-1), group=group)
    return own


def all_gather_with_gradient(tensor: Tensor, group: dist.ProcessGroup) -> Tensor:
    """Flat [S] of every rank of the group -> [P, S]. One collective forward and one backward, which adds up, for each
    rank's slice, the gradients of all ranks of the group: the gradient of the sum of their objectives. The backward
    pass can itself be differentiated, as often as one likes."""
    return _Gather.apply(tensor, group)


# torch's own differentiable collectives have no second derivative.
class _Gather(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, tensor: Tensor, group: dist.ProcessGroup) -> Tensor:
        ctx.group = group
        return all_gather(tensor, group)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        return _Scatter.apply(gradients[0], ctx.group), None


class _Scatter(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, tensor: Tensor, group: dist.ProcessGroup) -> Tensor:
        ctx.group = group
        return reduce_scatter(tensor, group)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        return _Gather.apply(gradients[0].contiguous(), ctx.group), None


def all_to_all(tensor: Tensor, sent: list[int], received: list[int], group: dist.ProcessGroup) -> Tensor:
    """Flat pieces of so many numbers for each rank of the group -> those that came from each, flat, without gradient.
    One collective; a piece may be empty."""
    got = tensor.new_empty(sum(received))
    dist.all_to_all_single(got, tensor.contiguous(), received, sent, group=group)
    return got


def all_to_all_with_gradient(tensor: Tensor, sent: list[int], received: list[int], group: dist.ProcessGroup) -> Tensor:
    """The same, with one collective backward that brings each number's gradient back to its owner. The backward pass
    can itself be differentiated, as often as one likes."""
    return _AllToAll.apply(tensor, sent, received, group)


class _AllToAll(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, tensor: Tensor, sent: list[int], received: list[int], group: dist.ProcessGroup) -> Tensor:
        ctx.sent, ctx.received, ctx.group = sent, received, group
        return all_to_all(tensor, sent, received, group)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None, None]:
        return _AllToAll.apply(gradients[0], ctx.received, ctx.sent, ctx.group), None, None, None

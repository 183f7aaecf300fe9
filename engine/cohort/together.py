"""Peers of one network computed together: one forward and one backward pass over weights that lie side by side."""

from __future__ import annotations

import warnings
from collections import defaultdict
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call, vmap
from torch.overrides import TorchFunctionMode

from engine.cohort import one_by_one
from engine.cohort.averaging import averaged
from engine.cohort.peer import Resident
from engine.config import RunConfig
from engine.ranks.placement import Placement
from losses import Signals


def hindrance(config: RunConfig, placement: Placement) -> str | None:
    """Why no peers of any rank can be computed together; None where some can, by all that a config says."""
    if config.train.peer_threads > 1:
        return "train.peer_threads computes the peers in threads of their own"
    if (found := one_by_one.reason(config)) is not None:
        return found
    if config.train.sync_bn and placement.world > len(placement.groups):
        return "train.sync_bn has ranks talk within the networks"
    if not any(alike(config, placement.of(group.ranks[0])) for group in placement.groups):
        return "no rank has two peers that learn and have the same network, options and frozen parts"
    return None


def alike(config: RunConfig, placement: Placement) -> list[list[int]]:
    """The peers that live here and learn, group by group of the same network; who is alone is left out."""
    kinds: dict[tuple[str, ...], list[int]] = defaultdict(list)
    for k in placement.residents:
        _, peer = config.cohort[k]
        if peer.learns:
            kinds[peer.network, repr(peer.options), repr(peer.frozen_parts)].append(k)
    return [group for group in kinds.values() if len(group) > 1]


class Together:
    """Groups of peers of one network, each computed as one.

    The peers stay what they are: in each pass their parameters and buffers are copied side by side in one go, `vmap`
    computes K convolutions as one of K groups, gradients come back to each peer's own parameters, and what the pass has
    done to buffers is copied back. Of K peers' operations 1/K are left.

    Args:
        groups: peers that are built alike.
        replica_group: the ranks that hold them.
        device: of this rank.
    """

    def __init__(
        self, groups: Sequence[Sequence[Resident]], replica_group: dist.ProcessGroup, device: torch.device
    ) -> None:
        self._groups = [_Group(residents) for residents in groups]
        self.wrapped = [averaged(group, replica_group, device, group.apart) for group in self._groups]
        """The groups as they are called in training: gradients of all peers of one are averaged as of one network."""

    def __call__(self, views: Mapping[int, Tensor]) -> dict[int, Signals]:
        """The live signals of all peers of the groups, each on the view [N, channels, H, W] that it sees."""
        return {k: own for group in self.wrapped for k, own in group(views).items()}

    def take_over(self, residents: Mapping[int, Resident]) -> None:
        """Has the peers of the groups computed in no other way from now on."""
        for group in self._groups:
            for k in group.indices:
                residents[k].wrapped = residents[k].peer  # What averaged each by itself holds as much as its gradients.

    def check(self, views: Mapping[int, Tensor]) -> None:
        """Tries it, and changes nothing. Raises: ValueError, with what of a network cannot be done for several."""
        for group in self._groups:
            try:
                with torch.no_grad():
                    group(views, keep=True)
            except (RuntimeError, ValueError, NotImplementedError) as error:
                reason = str(error).strip().partition("\n")[0]
                if "randomness" in reason or "random operation" in reason:
                    reason = "it draws random numbers, such as dropout, and each peer draws its own"
                network = group.base.get_submodule("network")
                raise ValueError(f"{type(network).__name__}: {reason}") from None


class _Group(nn.Module):
    def __init__(self, residents: Sequence[Resident]) -> None:
        super().__init__()
        self.indices = [resident.index for resident in residents]
        self.peers = nn.ModuleList([resident.peer for resident in residents])
        buffers = [name for name, _ in self.named_buffers()]
        self.apart = [*buffers, *(f"peers.{i}.{name}" for i, r in enumerate(residents) for name in r.unsynchronised)]
        """Names of what replicas do not have in common."""
        self._names = [name for name, _ in self.base.named_parameters()]
        self._buffer_names = [name for name, _ in self.base.named_buffers()]
        self._weights = _by_place([list(peer.parameters()) for peer in self.peers])
        self._statistics = _by_place([list(peer.buffers()) for peer in self.peers])

    @property
    def base(self) -> nn.Module:
        """The peer whose modules are called, with the weights of all."""
        return self.peers[0]

    def forward(self, views: Mapping[int, Tensor], *, keep: bool = False) -> dict[int, Signals]:
        """Args: keep: leave the peers' buffers as they are."""
        count = len(self.indices)
        parameters = dict(zip(self._names, _SideBySide.apply(count, *self._weights), strict=True))
        blocks = [_block(self._statistics[i], count) for i in range(0, len(self._statistics), count)]
        _copy(_slices(blocks), self._statistics)
        buffers = dict(zip(self._buffer_names, blocks, strict=True))
        images = [views[k] for k in self.indices]
        shared = all(x is images[0] for x in images)
        with warnings.catch_warnings():
            # What vmap has no rule for is done peer by peer: a pooling's memory format, and of no weight.
            warnings.filterwarnings("ignore", "There is a performance drop")
            run = vmap(partial(_run, self.base), in_dims=(0, 0, None if shared else 0), randomness="error")
            found = run(parameters, buffers, images[0] if shared else torch.stack(images))
        if not keep:
            _copy(self._statistics, _slices(blocks))
        own = {name: x.unbind() for name, x in found.items()}
        return {k: {name: x[i] for name, x in own.items()} for i, k in enumerate(self.indices)}


def _run(base: nn.Module, parameters: dict[str, Tensor], buffers: dict[str, Tensor], images: Tensor) -> dict[str, Any]:
    with _NormsAsOne():
        found: dict[str, Any] = functional_call(base, (parameters, buffers), (images, None))
    return found


class _NormsAsOne(TorchFunctionMode):
    """Within, K batch normalisations of C channels are one of K C channels. The rule of vmap's own would be as many as
    six passes over the maps."""

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if function is F.batch_norm:
            bound = dict(zip(_ARGUMENTS, args, strict=False)) | (kwargs or {})
            return _Norm.apply(*(bound.get(name, default) for name, default in _ARGUMENTS.items()))
        return function(*args, **(kwargs or {}))


_ARGUMENTS: dict[str, Any] = {
    "input": None,
    "running_mean": None,
    "running_var": None,
    "weight": None,
    "bias": None,
    "training": False,
    "momentum": 0.1,
    "eps": 1e-5,
}


class _Norm(torch.autograd.Function):
    @staticmethod
    def forward(*arguments: Any) -> Tensor:
        return F.batch_norm(*arguments)

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        pass

    @staticmethod
    def vmap(info: Any, in_dims: Any, x: Tensor, *rest: Any) -> tuple[Tensor, int]:
        """Autograd sees what is done here: x [N, K, C, ...] as [N, K C, ...]."""
        of_channels, how = rest[:4], rest[4:]
        rows: list[Any] = [
            None if p is None else _of_all(p, dim, info.batch_size, 0).reshape(-1)
            for p, dim in zip(of_channels, in_dims[1:5], strict=True)
        ]
        y = F.batch_norm(_of_all(x, in_dims[0], info.batch_size, 1).flatten(1, 2), *rows, *how)
        return y.unflatten(1, (info.batch_size, -1)), 1


def _of_all(x: Tensor, dim: int | None, count: int, place: int) -> Tensor:
    """With the peers in dimension `place`."""
    return x.movedim(dim, place) if dim is not None else x.unsqueeze(place).repeat_interleave(count, place)


def _by_place(of_peers: Sequence[Sequence[Tensor]]) -> list[Tensor]:
    """Those of the first place of all peers, of the second, ..."""
    return [x for same in zip(*of_peers, strict=True) for x in same]


def _block(like: Tensor, count: int) -> Tensor:
    """Room for `count` tensors like this one, each with its strides."""
    return like.new_empty_strided((count, *like.shape), (like.numel(), *like.stride()))


def _slices(blocks: Sequence[Tensor]) -> list[Tensor]:
    return [x for block in blocks for x in block.unbind()]


@torch.no_grad()
def _copy(to: Sequence[Tensor], of: Sequence[Tensor]) -> None:
    """All of one number format in one go."""
    for dtype in dict.fromkeys(x.dtype for x in to):
        chosen = [(a, b) for a, b in zip(to, of, strict=True) if a.dtype == dtype]
        torch._foreach_copy_([a for a, _ in chosen], [b for _, b in chosen])


class _SideBySide(torch.autograd.Function):
    """K tensors of each place -> one block [K, ...] of each place."""

    @staticmethod
    def forward(ctx: Any, count: int, *parameters: Tensor) -> tuple[Tensor, ...]:
        ctx.count, ctx.strides = count, [p.stride() for p in parameters[::count]]
        ctx.set_materialize_grads(False)
        blocks = [_block(parameters[i], count) for i in range(0, len(parameters), count)]
        _copy(_slices(blocks), parameters)
        frozen = [b for i, b in enumerate(blocks) if not ctx.needs_input_grad[1 + i * count]]
        ctx.mark_non_differentiable(*frozen)
        return tuple(blocks)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor | None) -> tuple[Any, ...]:
        rows = zip(gradients, ctx.strides, strict=True)
        return None, *(x for g, strides in rows for x in ([None] * ctx.count if g is None else _apart(g, strides)))


def _apart(block: Tensor, strides: tuple[int, ...]) -> Sequence[Tensor]:
    """A block's tensors, with the strides that DDP wants of gradients: those of the parameters."""
    if block.stride()[1:] == strides:
        return block.unbind()
    return [torch.empty_strided(x.shape, strides, dtype=x.dtype, device=x.device).copy_(x) for x in block]

"""Modules whose gradients are averaged over the ranks that hold them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel


def averaged(
    module: nn.Module, group: dist.ProcessGroup | None, device: torch.device, ignored: Sequence[str] = ()
) -> nn.Module:
    """A module as it is called in training: its gradients are averaged over a group, if that has several ranks.

    Args:
        ignored: the names of its parameters that each rank keeps to itself.
    """
    assert group is not None
    if group.size() == 1 or device.type == "meta":
        return module
    # Of DDP's own making, and the only way to have it leave parameters alone.
    DistributedDataParallel._set_params_and_buffers_to_ignore_for_model(module, ignored)
    return DistributedDataParallel(
        module,
        device_ids=[device.index] if device.type == "cuda" else None,
        process_group=group,
        gradient_as_bucket_view=True,
        **_KEEP_BUFFERS,
    )


# Each rank keeps its own BatchNorm statistics; average_buffers brings them together when somebody looks. The argument's
# name changed with torch 2.13.
_NEW_NAME = "forward_sync_buffers" in DistributedDataParallel.__init__.__annotations__
_KEEP_BUFFERS: Any = {"forward_sync_buffers" if _NEW_NAME else "broadcast_buffers": False}

"""A moving average of a peer's network that teaches while it is made, as opposed to one that is only evaluated."""

from __future__ import annotations

import copy

import torch
from torch import Tensor, nn


class Teacher(nn.Module):
    """A copy of a network whose parameters follow it, and whose BatchNorm statistics are of its own forward passes."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.module = copy.deepcopy(network).requires_grad_(False).train()

    @torch.no_grad()
    def forward(self, images: Tensor) -> Tensor:
        """Logits [N, C] of images [N, channels, H, W], constant."""
        logits: Tensor = self.module(images)
        return logits

    @torch.no_grad()
    def update(self, network: nn.Module, decay: float) -> None:
        """theta' <- phi theta' + (1 - phi) theta, of parameters alone; phi = 0 copies."""
        torch._foreach_lerp_(list(self.module.parameters()), list(network.parameters()), 1 - decay)

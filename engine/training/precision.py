"""The settings of the whole process that decide how exact and how fast a network computes."""

from __future__ import annotations

import torch

from engine.config import RunConfig


def set_precision(config: RunConfig, device: torch.device) -> None:
    """To be called before networks are built by whatever computes with them: training, evaluation, measurements."""
    if config.precision.compile:
        # The limit counts all modules that are compiled in place, in training and in evaluation.
        torch._dynamo.config.recompile_limit = 16 * len(config.cohort)
    if device.type == "cuda":
        torch.backends.cudnn.benchmark = True
        torch.backends.cudnn.allow_tf32 = config.precision.tf32
        torch.set_float32_matmul_precision("high" if config.precision.tf32 else "highest")

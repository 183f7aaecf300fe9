"""Every method, with the options that change what it does to a device."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

MEMORY = {"negatives": "memory", "num_negatives": 32, "width": 16}
COUNTS = "a sharded table asks how many rows each rank wants"


@dataclass(frozen=True)
class Case:
    """A cohort of small ResNets. Two peers unless it says otherwise."""

    method: dict[str, Any]
    peers: int = 2
    networks: list[dict[str, Any]] | None = None
    """Other peers than the small ResNets."""
    sections: dict[str, Any] = field(default_factory=dict)
    waits: str = ""
    """Why the host has to wait for the device in its steps, if it is known to."""
    tolerance: float = 1e-3
    """Of most tensors after three steps, in norm, see `checks.assert_close`."""
    fp16: bool = True


CASES: dict[str, Case] = {
    "independent": Case({"name": "independent"}),
    "dml": Case({"name": "dml"}),
    "dml_sequential": Case({"name": "dml", "order": "sequential"}, fp16=False),
    "dml_ema": Case({"name": "dml"}, sections={"train": {"ema_decay": 0.9}}),
    "dml_clip": Case({"name": "dml"}, sections={"train": {"clip_norm": 0.5}}),
    "dml_accumulation": Case({"name": "dml"}, sections={"train": {"accumulation": 2}}),
    "dml_adamw": Case({"name": "dml"}, sections={"optimizer": {"name": "adamw", "lr": 0.002}}, tolerance=2e-3),
    "cl_ilr": Case({"name": "cl_ilr"}),
    "one": Case({"name": "one", "ramp_up_epochs": 0}),
    "ffl": Case({"name": "ffl"}),
    "okddip_branch": Case({"name": "okddip", "ramp_up_epochs": 0}, 3),
    "okddip_network": Case({"name": "okddip", "form": "network", "ramp_up_epochs": 0}, 3),
    "dcm": Case({"name": "dcm"}),
    "dcl": Case({"name": "dcl", "interval": 2}),
    "codistillation": Case({"name": "codistillation", "interval": 2}),
    "codistillation_bf16": Case({"name": "codistillation", "interval": 2, "wire": "bf16"}, tolerance=2e-3),
    "kdcl_naive": Case({"name": "kdcl", "ensemble": "naive"}),
    "kdcl_linear": Case({"name": "kdcl", "ensemble": "linear"}),
    "kdcl_minlogit": Case({"name": "kdcl", "ensemble": "minlogit"}),
    "kdcl_general": Case({"name": "kdcl", "ensemble": "general"}, sections={"data": {"held_out": 0.1}}),
    "kdcl_mean": Case({"name": "kdcl", "ensemble": "mean"}),
    "pcl": Case({"name": "pcl", "ramp_up": "none"}, sections={"data": {"views": "per_peer"}}),
    "mcl_batch": Case({"name": "mcl", "width": 16, "negatives": "batch"}),
    "mcl_global": Case({"name": "mcl", "width": 16, "negatives": "global"}),
    "mcl_memory": Case({"name": "mcl", **MEMORY}),
    "mcl_memory_shared": Case({"name": "mcl", **MEMORY, "shared_negatives": True}),
    "lmcl": Case({"name": "lmcl", "width": 16, "meta_interval": 4}, tolerance=2e-3),
    "lmcl_memory": Case({"name": "lmcl", **MEMORY, "meta_interval": 4}, tolerance=2e-3),
    "lmcl_sharded": Case(
        {"name": "lmcl", **MEMORY, "meta_interval": 4, "bank_sharded": True}, waits=COUNTS, tolerance=2e-3
    ),
}

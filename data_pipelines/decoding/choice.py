"""Which decoder a run gets."""

import importlib.util
from dataclasses import dataclass
from typing import Literal

from data_pipelines.contract import DataError

INSTALL_DALI = "pip install cohort[dali-cuda13], or cohort[dali-cuda12] where the driver is for CUDA 12"


@dataclass(frozen=True)
class Choice:
    """A decoder, and why it is this one."""

    name: Literal["cpu", "mixed", "torchvision"]
    why: str

    def __str__(self) -> str:
        shown = {"cpu": "DALI on the CPU", "mixed": "DALI, partly on the GPU", "torchvision": "torchvision on the CPU"}
        return f"{shown[self.name]}: {self.why}"


def choose(wanted: str, *, cuda: bool) -> Choice:
    """Returns what `decoding.decoder` comes to.

    Args:
        wanted: auto, cpu, mixed or torchvision.
        cuda: whether the images are wanted on a CUDA device.

    Raises:
        DataError: DALI is asked for and not installed.
        ValueError: a mixed decoder is asked for on a device that is not CUDA.
    """
    if wanted == "torchvision":
        return Choice("torchvision", "decoding.decoder asks for it")
    if wanted != "auto" and not dali_installed():
        raise DataError(
            f"decoding.decoder: {wanted} needs NVIDIA DALI; expected auto or torchvision, or {INSTALL_DALI}"
        )
    if wanted == "mixed" and not cuda:
        raise ValueError("decoding.decoder: mixed needs a CUDA device; use auto, cpu or torchvision")
    if wanted != "auto":
        return Choice("mixed" if wanted == "mixed" else "cpu", "decoding.decoder asks for it")
    if cuda and dali_installed():
        return Choice("mixed", "DALI is installed, and the images are wanted on a CUDA device")
    if cuda:
        return Choice("torchvision", f"NVIDIA DALI is not installed; for it, {INSTALL_DALI}")
    return Choice("torchvision", "the images are wanted on the CPU, where it was measured to be faster than DALI")


def dali_installed() -> bool:
    """Whether DALI is there, without loading it."""
    try:
        return importlib.util.find_spec("nvidia.dali") is not None
    except ModuleNotFoundError:
        return False

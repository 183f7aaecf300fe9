"""Several small arrays that go to the device in one copy."""

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

_TYPES = {"int64": torch.int64, "float32": torch.float32}


class Parcel:
    """Filled and closed on the host, opened on the device."""

    def __init__(self) -> None:
        self._arrays: list[NDArray[np.int64] | NDArray[np.float32]] = []

    def add(self, array: NDArray[np.int64] | NDArray[np.float32]) -> int:
        """Puts an array in. Returns its place."""
        self._arrays.append(array)
        return len(self._arrays) - 1

    def close(self, device: torch.device) -> None:
        """Packs the arrays for a device; any thread may do it."""
        # Eight bytes are a multiple of either type.
        begins = np.cumsum([0, *(-(-array.nbytes // 8) * 8 for array in self._arrays)])
        packed = torch.empty(int(begins[-1]), dtype=torch.uint8, pin_memory=device.type == "cuda")
        bytes_ = packed.numpy()
        for begin, array in zip(begins, self._arrays, strict=False):
            bytes_[begin : begin + array.nbytes] = np.ascontiguousarray(array).reshape(-1).view(np.uint8)
        self._begins, self._packed, self._device = begins, packed, device

    def open(self) -> list[Tensor]:
        """The arrays as tensors on the device, in the order in which they were put in. The host does not wait."""
        sent = self._packed.to(self._device, non_blocking=True)
        return [
            sent[begin : begin + array.nbytes].view(_TYPES[array.dtype.name]).view(array.shape)
            for begin, array in zip(self._begins.tolist(), self._arrays, strict=False)
        ]

"""Whatever is told again is what torch would work out anew."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode

import models
from models.told_again import ToldAgain, tensors
from models.weightless import weightless

aten = torch.ops.aten


def look(x: Tensor) -> tuple[object, ...]:
    return x.dtype, x.shape, x.stride(), x.storage_offset(), x.untyped_storage().nbytes(), x.device.type


class Compared(TorchDispatchMode):
    """Asks for each operation twice, and torch itself for what it makes."""

    def __init__(self) -> None:
        super().__init__()
        self.call, self.compared = ToldAgain(), 0

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if function._schema.is_mutable:
            return self.call(function, args, kwargs)
        own = [look(x) for x in tensors(function(*args, **kwargs))]
        for _ in range(2):
            again = self.call(function, args, kwargs)
            assert [look(x) for x in tensors(again)] == own, function
        self.compared += 1
        return again


@pytest.mark.parametrize(
    ("network", "options"),
    [
        ("cifar_resnet8_b", {}),
        ("cifar_densenet_bc_22_12", {}),
        ("cifar_shufflenetv2_x0_5", {}),
        ("cifar_mobilenet", {}),
        ("timm/vit_tiny_patch16_224", {"img_size": 32, "depth": 2}),
    ],
)
def test_forward_and_backward_of_a_network(network: str, options: dict[str, Any]) -> None:
    with weightless(network):
        module = models.create(network, 10, 3, **options)
    with Compared() as seen:
        logits = module(torch.zeros(4, 3, 32, 32, device="meta"))
        F.cross_entropy(logits, torch.zeros(4, dtype=torch.int64, device="meta")).backward()
    assert seen.compared > 50


def test_arguments_that_are_equal_and_not_alike() -> None:
    call, x = ToldAgain(), torch.zeros(3, dtype=torch.int64, device="meta")
    assert [call(aten.add.Scalar, (x, one), {}).dtype for one in (1, 1.0, True, 1)] == [
        torch.int64,
        torch.float32,
        torch.int64,
        torch.int64,
    ]
    wide = torch.zeros(4, 6, device="meta")
    assert [call(aten.clone.default, (y,), {}).stride() for y in (wide, wide.t().contiguous().t())] == [(6, 1), (1, 4)]


def test_what_is_no_new_tensor_is_asked_for_each_time() -> None:
    call, x = ToldAgain(), torch.zeros(2, 3, device="meta")
    for _ in range(2):
        assert call(aten.add_.Tensor, (x, x), {}) is x
        assert call(aten.view.default, (x, [6]), {}).untyped_storage()._cdata == x.untyped_storage()._cdata
    numbers = torch.arange(3.0)
    assert [float(call(aten.sum.default, (numbers + i,), {})) for i in range(2)] == [3.0, 6.0]


def test_results_have_memory_of_their_own() -> None:
    call, x = ToldAgain(), torch.zeros(2, 3, device="meta")
    found = [call(aten.max.dim, (x, 1), {}) for _ in range(3)]
    assert len({y.untyped_storage()._cdata for pair in found for y in pair}) == 6


def test_a_network_that_lets_go_of_its_maps_is_no_larger() -> None:
    """Nothing of a result is kept to tell it again."""
    call = ToldAgain()
    layer = nn.Linear(3, 5, device="meta")
    kept = call(aten.addmm.default, (layer.bias, torch.zeros(2, 3, device="meta"), layer.weight.t()), {})
    storage = torch.multiprocessing.reductions.StorageWeakRef(kept.untyped_storage())
    del kept
    assert storage.expired()

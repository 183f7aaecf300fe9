"""Convolutions and batch normalisation differentiated by hand are PyTorch's, to the second derivative."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from engine.cohort.precision import autocast
from engine.cohort.second_derivative import DifferentiatedTwice

_ROWS, _CLASSES = 5, 4


def small_network() -> nn.Module:
    """Every kind of convolution that the networks have, biases that normalisation takes away again left out."""
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 8, 3, stride=2, padding=1, bias=False),
        nn.BatchNorm2d(8),
        nn.Softplus(),  # twice differentiable where a ReLU is not
        nn.Conv2d(8, 6, (3, 1), padding=(1, 0), dilation=(1, 2), groups=2),
        nn.Tanh(),
        nn.Conv2d(6, 6, 1, padding="same", bias=False),
        nn.BatchNorm2d(6, eps=1e-3),
        nn.Softplus(),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(6, _CLASSES),
    )


def derivatives(network: nn.Module, images: Tensor) -> list[Tensor]:
    """Gradients of a loss, and those of their product with a constant, by images and parameters."""
    leaves = [images.requires_grad_(), *network.parameters()]
    generator = torch.Generator().manual_seed(1)
    loss = F.cross_entropy(network(images).float() if images.dtype != torch.float64 else network(images), _TARGETS)
    gradients = torch.autograd.grad(loss, leaves, create_graph=True)
    along = sum((g * torch.randn(g.shape, generator=generator).to(g)).sum() for g in gradients)
    return [*gradients, *torch.autograd.grad(along, leaves)]


_TARGETS = torch.arange(_ROWS) % _CLASSES


def images(dtype: torch.dtype) -> Tensor:
    """Channels last, as networks have them."""
    made = torch.randn(_ROWS, 3, 16, 16, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    return made.to(dtype, memory_format=torch.channels_last)


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-12), (torch.float32, 1e-5)])
def test_both_derivatives_are_those_of_pytorch(dtype: torch.dtype, tolerance: float) -> None:
    network = small_network().to(dtype)
    expected = derivatives(network, images(dtype))
    with DifferentiatedTwice():
        found = derivatives(network, images(dtype))
    for one, other in zip(found, expected, strict=True):
        assert (one - other).norm() <= tolerance * other.norm() + tolerance


def test_running_statistics_stay() -> None:
    network = small_network()
    before = {name: b.clone() for name, b in network.named_buffers() if "running" in name}
    with DifferentiatedTwice():
        network(images(torch.float32))
    assert before
    assert all(torch.equal(b, before[name]) for name, b in network.named_buffers() if name in before)


def test_layers_in_evaluation_are_pytorchs() -> None:
    network = small_network().eval()
    expected = network(images(torch.float32))
    with DifferentiatedTwice():
        assert torch.equal(network(images(torch.float32)), expected)


@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_convolutions_follow_autocast(device: str) -> None:
    network = small_network().to(device)
    with DifferentiatedTwice(), autocast(torch.device(device), torch.bfloat16):
        shown = network[:6](images(torch.float32).to(device))
    assert shown.dtype == torch.bfloat16


def test_both_derivatives_exist_in_bfloat16() -> None:
    network = small_network()
    with DifferentiatedTwice(), autocast(torch.device("cpu"), torch.bfloat16):
        found = derivatives(network, images(torch.float32))
    expected = derivatives(network, images(torch.float32))
    assert all(x.isfinite().all() for x in found)
    gradients = len(found) // 2
    for one, other in list(zip(found, expected, strict=True))[:gradients]:
        assert (one - other).norm() <= 0.1 * other.norm() + 1e-2

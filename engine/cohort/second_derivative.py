"""Convolutions and batch normalisation whose gradient is differentiated by hand: what an outer step spends most on.

PyTorch differentiates the backward pass of a convolution by convolutions whose kernels are whole feature maps, and that
of batch normalisation by some twenty passes over them. Numbers are the same but for rounding.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.overrides import TorchFunctionMode


class DifferentiatedTwice(TorchFunctionMode):
    """Within, `conv2d` and `batch_norm` in training are those of this file wherever a network calls them; their
    gradient can be differentiated once more, and running statistics are left alone."""

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return _BY_HAND.get(function, function)(*args, **(kwargs or {}))


def _conv2d(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: Any = 1,
    padding: Any = 0,
    dilation: Any = 1,
    groups: int = 1,
) -> Tensor:
    if isinstance(padding, str) or x.dim() != 4:
        return torch.conv2d(x, weight, bias, stride, padding, dilation, groups)
    device = x.device.type
    if torch.amp.is_autocast_available(device) and torch.is_autocast_enabled(device):
        dtype = torch.get_autocast_dtype(device)
        x, weight = x.to(dtype), weight.to(dtype)
    how = (_pair(stride), _pair(padding), _pair(dilation), False, [0, 0], groups)
    y: Tensor = _Convolution.apply(x, weight, how)
    return y if bias is None else y + bias.to(y.dtype)[:, None, None]


def _pair(value: Any) -> list[int]:
    return [value, value] if isinstance(value, int) else list(value) * (3 - len(value))


class _Convolution(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, how: Any) -> Tensor:
        ctx.save_for_backward(x, weight)
        ctx.how = how
        return torch.ops.aten.convolution(x, weight, None, *how)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
        x, weight = ctx.saved_tensors
        return *_ConvolutionGradient.apply(gradients[0], x, weight, ctx.how, ctx.needs_input_grad[:2]), None


class _ConvolutionGradient(torch.autograd.Function):
    """(dy, x, W) -> dx = W^T * dy, dW = x * dy, both bilinear."""

    @staticmethod
    def forward(
        ctx: Any, dy: Tensor, x: Tensor, weight: Tensor, how: Any, wanted: tuple[bool, bool]
    ) -> tuple[Tensor | None, Tensor | None]:
        ctx.save_for_backward(dy, x, weight)
        ctx.how = how
        ctx.set_materialize_grads(False)
        dx, dw, _ = torch.ops.aten.convolution_backward(dy, x, weight, None, *how, [*wanted, False])
        return dx, dw

    @staticmethod
    @once_differentiable
    def backward(
        ctx: Any, a: Tensor | None, b: Tensor | None
    ) -> tuple[Tensor | None, Tensor | None, Tensor | None, None, None]:
        """Of <dx, a> + <dW, b>, a [N, C, H, W] and b of W's shape."""
        dy, x, weight = ctx.saved_tensors
        convolution, back = torch.ops.aten.convolution, torch.ops.aten.convolution_backward
        of_dy = of_x = of_weight = None
        if a is not None:
            of_dy = convolution(a, weight, None, *ctx.how)
            of_weight = back(dy, a, weight, None, *ctx.how, [False, True, False])[1]
        if b is not None:
            of_b = convolution(x, b, None, *ctx.how)
            of_dy = of_b if of_dy is None else of_dy.add_(of_b)
            if ctx.needs_input_grad[1]:
                of_x = back(dy, x, b, None, *ctx.how, [True, False, False])[0]
        return of_dy, of_x, of_weight, None, None


def _batch_norm(
    x: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    training: bool = False,
    momentum: float = 0.1,
    eps: float = 1e-5,
) -> Tensor:
    if not training or weight is None or bias is None:
        return F.batch_norm(x, running_mean, running_var, weight, bias, training, momentum, eps)
    y: Tensor = _BatchNorm.apply(x, weight, bias, eps)
    return y


class _BatchNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor, eps: float) -> Tensor:
        y, mean, inverse = torch.ops.aten.native_batch_norm(x, weight, bias, None, None, True, 0.0, eps)
        ctx.save_for_backward(x, weight, mean, inverse)
        ctx.eps = eps
        return y

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, Tensor, Tensor, None]:
        return *_BatchNormGradient.apply(gradients[0], *ctx.saved_tensors, ctx.eps), None


class _BatchNormGradient(torch.autograd.Function):
    r"""(dy, x, w) -> dx = w s (dy - mean(dy) - h mean(dy h)), dw = \sum dy h, db = \sum dy, with h = (x - mean(x)) s,
    s = 1 / sqrt(var(x) + eps); sums and means are over the M = N H W values of a channel."""

    @staticmethod
    def forward(
        ctx: Any, dy: Tensor, x: Tensor, weight: Tensor, mean: Tensor, inverse: Tensor, eps: float
    ) -> tuple[Tensor, Tensor, Tensor]:
        dx, dw, db = _gradient(dy, x, weight, mean, inverse, eps)
        ctx.save_for_backward(dy, x, weight, mean, inverse, dw, db)
        ctx.eps = eps
        return dx, dw, db

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, a: Tensor, b: Tensor, c: Tensor) -> tuple[Tensor, Tensor, Tensor, None, None, None]:
        r"""Of <dx, a> + <dw, b> + <db, c>, with A = \sum a h, B = dw = \sum dy h and
        T = s (\sum a dy - \sum a \sum dy / M - A B / M), so that <dx, a> = \sum_channels w T:

            of dy:  w s (a - mean(a) - h mean(a h)) + b h + c
            of w:   T
            of x:   s (u - mean(u) - h mean(u h)) - w T s h / M,    u = (b - w s A / M) dy - (w s B / M) a
        """
        dy, x, weight, mean, inverse, dw, db = ctx.saved_tensors
        of_dy, sum_ah, sum_a = _gradient(a, x, weight, mean, inverse, ctx.eps)
        m = x.numel() // x.shape[1]
        sum_ady = _sum(a, dy)
        t = inverse * (sum_ady - sum_a * db / m - sum_ah * dw / m)
        k_dy, k_a = b - weight * inverse * sum_ah / m, -weight * inverse * dw / m
        # of_x = k1 dy + k2 a + k3 h + k4, and h = inverse x - inverse mean.
        k3 = -inverse * (k_dy * dw + k_a * sum_ah + weight * t) / m
        k4 = -inverse * (k_dy * db + k_a * sum_a) / m - k3 * inverse * mean
        of_x = torch.addcmul(_wide(k4, x), x, _wide(k3 * inverse, x))
        of_x.addcmul_(dy, _wide(inverse * k_dy, x)).addcmul_(a, _wide(inverse * k_a, x))
        of_dy.addcmul_(x, _wide(b * inverse, x)).add_(_wide(c - b * inverse * mean, x))
        return of_dy, of_x, t, None, None, None


def _gradient(
    dy: Tensor, x: Tensor, weight: Tensor, mean: Tensor, inverse: Tensor, eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    return torch.ops.aten.native_batch_norm_backward(
        dy, x, weight, None, None, mean, inverse, True, eps, [True, True, True]
    )


def _sum(a: Tensor, b: Tensor) -> Tensor:
    """[C] of the products of [N, C, ...]."""
    return (a * b).sum([0, *range(2, a.dim())], dtype=torch.float32 if a.dtype != torch.float64 else a.dtype)


def _wide(of_channels: Tensor, x: Tensor) -> Tensor:
    return of_channels.to(x.dtype).view(-1, *[1] * (x.dim() - 2))


_BY_HAND: dict[Callable[..., Any], Callable[..., Any]] = {torch.conv2d: _conv2d, F.batch_norm: _batch_norm}

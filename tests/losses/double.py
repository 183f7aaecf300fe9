"""Loss terms in float64 as the papers write them, and the comparison of a method with them, gradients and all.

Nothing here calls the code under test. Where a reference detaches a target, the paper's teacher is constant.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from losses import Method, Progress, Terms

Leaves = Sequence[Mapping[str, Tensor]]
Reference = Callable[[Leaves, Mapping[str, Tensor], Tensor], Terms]
"""(signals of all peers, parameters of the method, targets) -> the terms of the joint objective."""


def at_epoch(epoch: int) -> Progress:
    """Some step in the middle of an epoch."""
    return Progress(step=10 * epoch + 7, steps_per_epoch=10, epochs=300)


def draw(peers: int, seed: int = 0, n: int = 6, **shapes: tuple[int, ...]) -> tuple[list[dict[str, Tensor]], Tensor]:
    """Signals [n, *shape] of each peer, the same numbers in float32 and float64, and classes [n] of 7. A `trunk` is one
    tensor for all peers."""
    rng = np.random.default_rng(seed)

    def drawn(shape: tuple[int, ...]) -> Tensor:
        return torch.tensor(2 * rng.normal(size=(n, *shape))).float().double()

    trunk = {"trunk": drawn(shapes.pop("trunk"))} if "trunk" in shapes else {}
    signals = [{name: drawn(shape) for name, shape in shapes.items()} | trunk for _ in range(peers)]
    return signals, torch.tensor(rng.integers(7, size=n))


def softmax(z: Tensor) -> Tensor:
    e = z.exp()
    return e / e.sum(-1, keepdim=True)


def ce(z: Tensor, y: Tensor) -> Tensor:
    return -torch.stack([softmax(z)[n, c].log() for n, c in enumerate(y.tolist())]).mean()


def kl(target: Tensor, own: Tensor) -> Tensor:
    """KL(target || own) of probabilities [N, C], the mean over rows."""
    return (target * (target / own).log()).sum() / len(own)


def kd(z: Tensor, t: Tensor, temperature: float = 3.0) -> Tensor:
    return temperature**2 * kl(softmax(t / temperature), softmax(z / temperature))


def batch_norm(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """Of one batch, over all but dimension 1."""
    over = [d for d in range(x.ndim) if d != 1]
    shape = [-1 if d == 1 else 1 for d in range(x.ndim)]
    centred = x - x.mean(over, keepdim=True)
    scaled = centred / ((centred**2).mean(over, keepdim=True) + 1e-5).sqrt()
    return scaled * weight.reshape(shape) + bias.reshape(shape)


def _leaves(signals: Leaves, dtype: torch.dtype, live: Sequence[int]) -> list[dict[str, Tensor]]:
    leaves = [
        {name: x.to(dtype, copy=True).requires_grad_(k in live) for name, x in peer.items()}
        for k, peer in enumerate(signals)
    ]
    for k in live:
        if "trunk" in leaves[k]:
            leaves[k]["trunk"] = leaves[live[0]]["trunk"]
    return leaves


def _gradients(term: Tensor, leaves: Mapping[str, Tensor]) -> dict[str, Tensor | None]:
    gradients = torch.autograd.grad(term, list(leaves.values()), retain_graph=True, allow_unused=True)
    return dict(zip(leaves, gradients, strict=True))


def _flat(leaves: Leaves, parameters: Mapping[str, Tensor], live: Sequence[int]) -> dict[str, Tensor]:
    own = {name if name == "trunk" else f"{k}/{name}": x for k in live for name, x in leaves[k].items()}
    return own | {f"method/{name}": x for name, x in parameters.items()}


def _close(found: Tensor | None, expected: Tensor | None, what: str, tolerance: float) -> None:
    if expected is None or not expected.any():
        assert found is None or not found.any(), f"{what}: a gradient where there is none"
        return
    assert found is not None, f"{what}: no gradient"
    error, largest = (found.double() - expected).abs().max(), expected.abs().max()
    # A bias before BatchNorm has no gradient but for rounding.
    assert error < tolerance * largest + 1e-7, f"{what}: off by {error:.1e}, the largest entry is {largest:.1e}"


def assert_agrees(
    method: Method, signals: Leaves, y: Tensor, epoch: int, reference: Reference, tolerance: float = 3e-6
) -> None:
    """The terms with all peers live and the gradient of each by every signal and parameter; then, for some of the peers
    live, the gradient of their part by their own signals and by what all share, which must be that of the whole."""
    everyone = range(len(signals))
    exact = {name: p.detach().double().requires_grad_() for name, p in method.named_parameters()}
    leaves64 = _leaves(signals, torch.float64, everyone)
    expected = reference(leaves64, exact, y)
    flat64 = _flat(leaves64, exact, everyone)

    leaves = _leaves(signals, torch.float32, everyone)
    terms = method(everyone, leaves, y, at_epoch(epoch))
    flat = _flat(leaves, dict(method.named_parameters()), everyone)
    assert terms.keys() == expected.keys()
    for key, term in terms.items():
        assert term.dtype == torch.float32
        np.testing.assert_allclose(term.item(), expected[key].item(), rtol=tolerance, err_msg=str(key))
        right = _gradients(expected[key], flat64)
        for name, gradient in _gradients(term, flat).items():
            _close(gradient, right[name], f"{key} by {name}", tolerance)

    whole = _gradients(torch.stack(list(expected.values())).sum(), flat64)
    for live in ([0], [len(signals) - 1], [0, 1]):
        leaves = _leaves(signals, torch.float32, live)
        part = torch.stack(list(method(live, leaves, y, at_epoch(epoch)).values())).sum()
        flat = _flat(leaves, dict(method.named_parameters()), live)
        for name, gradient in _gradients(part, flat).items():
            _close(gradient, whole[name], f"part of {live} by {name}", tolerance)


def reached(method: Method, signals: Leaves, y: Tensor, key: Any, epoch: int = 100) -> set[str]:
    """What one term has a gradient for: `peer/signal`, `trunk` and `method/parameter`."""
    leaves = _leaves(signals, torch.float32, range(len(signals)))
    term = method(range(len(signals)), leaves, y, at_epoch(epoch))[key]
    flat = _flat(leaves, dict(method.named_parameters()), range(len(signals)))
    return {name for name, gradient in _gradients(term, flat).items() if gradient is not None and gradient.any()}

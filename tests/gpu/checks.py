"""What is asked of what was found."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


def whole(found: Any) -> Any:
    """What was found, where it is not the traceback of a failure."""
    assert not isinstance(found, str), found
    return found


TURNED = 30
"""How much farther apart a few tensors may be: where a unit lies at zero, rounding turns it over, and the gradients of
what lies below change with it. Between two ways of adding up on one CPU 2e-2 was seen, beside 1e-5 without."""


def assert_close(one: dict[str, Tensor], other: dict[str, Tensor], relative: float) -> None:
    """Four of five tensors within `relative` of the other in norm, and all within 30 times that. What has hardly any
    norm of its own, such as a bias that was zero, is measured by a hundredth for each of its numbers at least."""
    assert one.keys() == other.keys()
    apart = {}
    for name, expected in other.items():
        x, y = one[name].double(), expected.double()
        apart[name] = (x - y).norm().item() / max(y.norm().item(), 0.01 * y.numel() ** 0.5)
        assert torch.isfinite(x).all(), name
    wrong = {name: f"{value:.1e}" for name, value in apart.items() if value > relative}
    assert len(wrong) <= len(apart) / 5, wrong
    assert max(apart.values()) <= TURNED * relative, wrong


def assert_terms_close(one: list[dict[str, float]], other: list[dict[str, float]], relative: float) -> None:
    """The numbers of each step within `relative` of the other's, or of 0.1 where they are less."""
    for step, (mine, theirs) in enumerate(zip(one, other, strict=True)):
        assert mine.keys() == theirs.keys()
        for name, y in theirs.items():
            assert abs(mine[name] - y) <= relative * max(abs(y), 0.1), f"step {step}, {name}: {mine[name]}, {y}"


def assert_learnt(found: dict[str, Any]) -> None:
    """All numbers are finite and the loss has fallen; a few updates may have been skipped, to find the loss scale."""
    assert not found["broken"]
    assert found["skipped"] <= 12
    assert found["last"] < found["first"]

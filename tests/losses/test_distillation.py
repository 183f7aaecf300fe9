"""The arithmetic that the methods with a tempered KL share, against loops and values worked out by hand."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from losses.functional import ramp_up, tempered_kl


@pytest.mark.parametrize(
    ("epoch", "weight"),
    [(0, 0.006738), (10, 0.02175), (20, 0.06005), (40, 0.2865), (60, 0.7316), (79, 0.99922), (80, 1.0), (299, 1.0)],
)
def test_ramp_up_at_the_epochs_of_the_published_code(epoch: int, weight: float) -> None:
    assert ramp_up(epoch, 80) == pytest.approx(weight, rel=2e-4)


def test_a_ramp_of_no_epochs_is_none() -> None:
    assert ramp_up(0, 0) == ramp_up(7, 0) == 1.0
    assert isinstance(ramp_up(3, 80), float)


def by_hand(z: np.ndarray, t: np.ndarray, temperature: float) -> tuple[float, np.ndarray, np.ndarray]:
    """T^2 KL(q || p), and its gradients T (p - q) / N by z and T q (log(q / p) - KL) / N by t."""
    value, by_z, by_t = 0.0, np.zeros_like(z), np.zeros_like(t)
    for n in range(len(z)):
        p = [math.exp(v / temperature) for v in z[n]]
        q = [math.exp(v / temperature) for v in t[n]]
        p, q = [v / sum(p) for v in p], [v / sum(q) for v in q]
        row = sum(b * math.log(b / a) for a, b in zip(p, q, strict=True))
        value += temperature**2 * row / len(z)
        for c, (a, b) in enumerate(zip(p, q, strict=True)):
            by_z[n, c] = temperature * (a - b) / len(z)
            by_t[n, c] = temperature * b * (math.log(b / a) - row) / len(z)
    return value, by_z, by_t


@pytest.mark.parametrize("temperature", [1.0, 2.0, 3.0])
def test_distillation_and_both_its_gradients(temperature: float) -> None:
    rng = np.random.default_rng(0)
    z, t = (2 * rng.normal(size=(5, 7)).astype(np.float32).astype(np.float64) for _ in range(2))
    student, teacher = (torch.tensor(x).float().requires_grad_() for x in (z, t))
    loss = temperature**2 * tempered_kl(student, teacher, temperature)
    loss.backward()
    value, by_z, by_t = by_hand(z, t, temperature)
    np.testing.assert_allclose(loss.item(), value, rtol=2e-6)
    np.testing.assert_allclose(student.grad, by_z, atol=2e-6 * np.abs(by_z).max())
    np.testing.assert_allclose(teacher.grad, by_t, atol=2e-6 * np.abs(by_t).max())


def test_saturated_logits_give_a_finite_loss_in_float32_also_from_half_precision() -> None:
    student = torch.tensor([[300.0, 0.0, -300.0]]).bfloat16().requires_grad_()
    loss = tempered_kl(student, torch.tensor([[-300.0, 0.0, 300.0]]).bfloat16(), 1.0)
    loss.backward()
    assert loss.dtype == torch.float32
    assert loss.item() == pytest.approx(600.0)
    assert student.grad is not None
    assert student.grad.isfinite().all()

"""Means over seeds, and how far a difference between two methods can be trusted."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Spread:
    """Of one figure over seeds."""

    mean: float
    deviation: float | None
    """The sample's standard deviation, by n - 1; None for one seed."""
    seeds: int


@dataclass(frozen=True)
class Gain:
    """Of one method over another, the mean of the differences between runs of the same seed."""

    mean: float
    half_width: float | None
    """Of the confidence interval of 95 %, mean - half_width to mean + half_width; None for one seed."""
    seeds: int

    @property
    def is_clear(self) -> bool:
        """Whether the interval leaves out 0."""
        return self.half_width is not None and abs(self.mean) > self.half_width


def spread_of(values: Sequence[float]) -> Spread | None:
    """Mean and deviation; None of nothing."""
    if not values:
        return None
    mean, n = math.fsum(values) / len(values), len(values)
    deviation = math.sqrt(math.fsum((value - mean) ** 2 for value in values) / (n - 1)) if n > 1 else None
    return Spread(mean, deviation, n)


def paired_gain(ours: Mapping[int, float], theirs: Mapping[int, float]) -> Gain | None:
    """What is gained, by the seeds that both have; None where they have none in common.

    d_s = ours_s - theirs_s; the interval is mean(d) +- t(0.975, n - 1) * deviation(d) / sqrt(n), Student's t for paired
    differences, which takes them to be normal.
    """
    found = spread_of([value - theirs[seed] for seed, value in ours.items() if seed in theirs])
    if found is None:
        return None
    if found.deviation is None:
        return Gain(found.mean, None, found.seeds)
    width = student_quantile(0.95, found.seeds - 1) * found.deviation / math.sqrt(found.seeds)
    return Gain(found.mean, width, found.seeds)


def student_quantile(within: float, freedom: int) -> float:
    """The t for which a Student variable of so many degrees of freedom lies within -t and t with this probability."""
    low, high = 0.0, 1.0
    while _student_within(high, freedom) < within:
        high *= 2
    for _ in range(200):
        middle = (low + high) / 2
        if _student_within(middle, freedom) < within:
            low = middle
        else:
            high = middle
    return high


def _student_within(t: float, freedom: int) -> float:
    """P(|T| <= t) for a whole number of degrees of freedom: the finite series 26.7.3 and 26.7.4 of Abramowitz and
    Stegun, Handbook of Mathematical Functions (1964)."""
    angle = math.atan(t / math.sqrt(freedom))
    sine, cosine = math.sin(angle), math.cos(angle)
    odd = freedom % 2 == 1
    if freedom == 1:
        return 2 * angle / math.pi
    term = cosine if odd else 1.0
    total, begin = term, 3 if odd else 2
    for k in range(begin, freedom - 1, 2):
        term *= cosine**2 * ((k - 1) / k)
        total += term
    return 2 / math.pi * (angle + sine * total) if odd else sine * total

"""Intervals over a few numbers: Student's t, without a library for it."""

from __future__ import annotations

import functools
import math
import statistics
from collections.abc import Sequence


def mean_and_interval(values: Sequence[float]) -> tuple[float, float | None]:
    """The mean of independent numbers and the half-width of its 95% interval.

    `t · s / √n`, with the sample's own standard deviation s and the 97.5% quantile of Student's
    distribution with n − 1 degrees of freedom. One number has no interval.
    """
    count = len(values)
    mean = statistics.fmean(values)
    if count < 2:
        return mean, None
    return mean, t_quantile(count - 1) * statistics.stdev(values) / math.sqrt(count)


@functools.cache
def t_quantile(degrees: int, level: float = 0.95) -> float:
    """The t that a t-distributed number lies within ±t of, at a level: 12.7 for 1 degree."""
    low, high = 0.0, 1.0
    while within(high, degrees) < level:
        low, high = high, 2 * high
    while high - low > 1e-12 * high:
        middle = (low + high) / 2
        low, high = (middle, high) if within(middle, degrees) < level else (low, middle)
    return (low + high) / 2


def within(t: float, degrees: int) -> float:
    """The probability that a t-distributed number lies in [−t, t].

    For a whole number of degrees of freedom it is a finite sum (Abramowitz & Stegun 1964,
    Handbook of Mathematical Functions, 26.7.3 and 26.7.4).
    """
    angle = math.atan(t / math.sqrt(degrees))
    sine, cosine = math.sin(angle), math.cos(angle)
    odd = degrees % 2
    term, total = (cosine, 0.0) if odd else (1.0, 0.0)
    for k in range(1 + odd, degrees, 2):
        total += term
        term *= cosine * cosine * k / (k + 1)
    return 2 / math.pi * (angle + sine * total) if odd else sine * total

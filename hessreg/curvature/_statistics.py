"""Estimates from random probes, with their confidence intervals."""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass

import torch
from torch import Tensor

__all__ = ["NORMAL_99", "Estimate", "half_width", "student_t_99"]

NORMAL_99 = 2.5758293035489004  # a standard normal number lies within this of 0 in 99 % of cases


@dataclass(frozen=True)
class Estimate:
    """A number and how far it may be off.

    Attributes:
        value: the estimate; ``float(estimate)`` is the same.
        error: half the width of the 99 % confidence interval.

    Example:
        >>> estimate = Estimate(12.345, 0.062)
        >>> float(estimate), str(estimate)
        (12.345, '12.345 ± 0.062')
    """

    value: float
    error: float

    def __float__(self) -> float:
        return self.value

    def __str__(self) -> str:
        return f"{self.value:.6g} ± {self.error:.2g}"


def half_width(samples: Tensor) -> Tensor:
    """Half the 99 % confidence interval [] of the mean of samples [m], infinite for a single one.

    Example:
        >>> half_width(torch.tensor([1.0, 2.0, 3.0]))
        tensor(5.7301)
    """
    m = len(samples)
    if m < 2:
        return torch.full_like(samples.sum(), math.inf)
    return samples.std() * (student_t_99(m - 1) / m**0.5)


@functools.cache
def student_t_99(freedom: int) -> float:
    """The number that Student's t exceeds in modulus in one of a hundred cases.

    By bisection of the closed form for whole degrees of freedom (Abramowitz and Stegun, 26.7.3 and
    26.7.4); above 200, the first terms of the expansion about the normal number (26.7.5).

    Example:
        >>> round(student_t_99(1), 3), round(student_t_99(9), 3), round(student_t_99(1000), 3)
        (63.657, 3.25, 2.581)
    """
    if freedom > 200:
        z = NORMAL_99
        return z + (z**3 + z) / (4 * freedom) + (5 * z**5 + 16 * z**3 + 3 * z) / (96 * freedom**2)
    low, high = 0.0, math.pi / 2
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (middle, high) if _within(middle, freedom) < 0.99 else (low, middle)
    return math.tan(high) * freedom**0.5


def _within(angle: float, freedom: int) -> float:
    """Probability that |t| < tan(angle) sqrt(freedom)."""
    odd = freedom % 2
    term = math.cos(angle) if odd else 1.0
    total = 0.0
    for i in range(1 + odd, freedom, 2):
        total += term
        term *= math.cos(angle) ** 2 * i / (i + 1)
    total *= math.sin(angle)
    return 2 / math.pi * (angle + total) if odd else total
